//! The Debian package, as `imds-agent/Cargo.toml` describes it.

use std::path::Path;

use anyhow::{Result, ensure};

use crate::workspace::{cargo, execute, root};

/// Packs what is in `dir`.
pub(super) fn build(dir: &Path) -> Result<()> {
    // Where the manifest says that it is.
    let expected = root().join("target/dist");
    ensure!(
        dir.canonicalize()? == expected.canonicalize().unwrap_or_default(),
        "the Debian package is made from {} only: unset CARGO_TARGET_DIR",
        expected.display()
    );
    let mut deb = cargo("deb");
    deb.args(["--no-build", "--no-strip", "--locked", "--package", "imds-agent", "--deb-revision", "1"]);
    execute(deb.arg("--output").arg(dir).current_dir(root()))
}
