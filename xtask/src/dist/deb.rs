//! Debian package, described in `imds-agent/Cargo.toml`.

use std::path::Path;

use anyhow::{Result, ensure};

use crate::workspace::{cargo, execute, root};

/// Builds the package from the files in `dir`.
pub(super) fn build(dir: &Path) -> Result<()> {
    // The manifest refers to files in this directory.
    let expected = root().join("target/dist");
    ensure!(
        dir.canonicalize()? == expected.canonicalize().unwrap_or_default(),
        "the Debian package can only be built from {}: unset CARGO_TARGET_DIR",
        expected.display()
    );
    let mut deb = cargo("deb");
    deb.args(["--no-build", "--no-strip", "--locked", "--package", "imds-agent", "--deb-revision", "1"]);
    execute(deb.arg("--output").arg(dir).current_dir(root()))
}
