//! The command `cargo xtask book`.

use std::{fs, process::Command};

use anyhow::{Context as _, Result, bail};
use imds_ebpf_build::Host;

use crate::workspace::{execute, print_status, root};

/// Files and directories of the site. They keep their relative paths, so that links from pages in `docs` to other files
/// of the repository resolve.
const CONTENT: [&str; 6] = ["CHANGELOG.md", "CONTRIBUTING.md", "README.md", "SECURITY.md", "deploy", "docs"];
/// Pages outside of `docs`, which follow those of docs/SUMMARY.md in the table of contents.
const PROJECT: &str = "
# Project

- [Contributing](CONTRIBUTING.md)
- [Security policy](SECURITY.md)
- [Changes](CHANGELOG.md)
";

pub(crate) fn run() -> Result<()> {
    if Host::current().find("mdbook").is_none() {
        bail!("mdbook is not installed: run `cargo install mdbook --locked`");
    }
    let source = root().join("target/book-source");
    if source.exists() {
        fs::remove_dir_all(&source).context("failed to remove the previous sources")?;
    }
    fs::create_dir_all(&source).context("failed to create the directory of the sources")?;
    let content = CONTENT.map(|name| root().join(name));
    execute(Command::new("cp").arg("--recursive").args(content).arg(&source))?;
    let summary = source.join("docs/SUMMARY.md");
    let pages = fs::read_to_string(&summary).context("failed to read docs/SUMMARY.md")?;
    fs::remove_file(&summary).context("failed to move docs/SUMMARY.md")?;
    fs::write(source.join("SUMMARY.md"), table_of_contents(&pages)).context("failed to write SUMMARY.md")?;
    execute(Command::new("mdbook").arg("build").arg(root()).env("MDBOOK_BOOK__SRC", &source))?;
    print_status("the site is in target/book");
    Ok(())
}

/// Returns the table of contents of the site, whose root is the repository's.
fn table_of_contents(pages: &str) -> String {
    let pages =
        pages.replace("](", "](docs/").replacen("# Summary\n", "# Summary\n\n[imds-agent](README.md)\n", 1);
    pages + PROJECT
}

#[test]
fn pages_of_docs_keep_their_directory() {
    let contents = table_of_contents("# Summary\n\n[Introduction](introduction.md)\n\n- [Pins](maps.md)\n");
    assert!(
        contents
            .starts_with("# Summary\n\n[imds-agent](README.md)\n\n[Introduction](docs/introduction.md)\n")
    );
    assert!(contents.contains("\n- [Pins](docs/maps.md)\n") && contents.ends_with("(CHANGELOG.md)\n"));
}
