//! Clients of the metadata service for `cargo xtask bench clients`: from `PyPI`, npm and Debian, in the cache.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::{
    apt, cache,
    workspace::{execute, pip_install, print_status, root},
};

/// The metadata client of a virtual machine's first boot.
const DEBIAN_CLIENT: &str = "cloud-init";

/// Returns the directory of the clients, which may be missing.
pub(crate) fn dir() -> Result<PathBuf> {
    Ok(cache::dir()?.join("clients"))
}

/// Downloads the pinned versions, and Debian's current one. Replaces what was downloaded before.
///
/// Reports sources whose download fails. The benchmark leaves their clients out.
pub(crate) fn fetch() -> Result<()> {
    let lists = root().join("tests/benches/clients");
    cache::make(&dir()?, |dir, staging| {
        let fetched = [
            ("PyPI", fetch_python(&lists, &dir.join("python"))),
            ("npm", fetch_node(&lists, &dir.join("node"))),
            ("Debian", fetch_debian(&staging.join("packages"), &dir.join("debian"))),
        ];
        for (source, result) in fetched {
            if let Err(error) = result {
                print_status(format_args!("clients from {source} are left out: {error:#}"));
            }
        }
        Ok(())
    })
}

fn fetch_python(lists: &Path, dir: &Path) -> Result<()> {
    execute(pip_install(dir).arg("--requirement").arg(lists.join("requirements.txt")))
}

fn fetch_node(lists: &Path, dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("failed to create {}", dir.display()))?;
    fs::copy(lists.join("package.json"), dir.join("package.json")).context("failed to copy package.json")?;
    let mut npm = Command::new("npm");
    npm.args(["install", "--silent", "--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts"]);
    execute(npm.arg("--prefix").arg(dir))
}

/// Unpacks the package and the dependencies that the machine lacks. Installs nothing.
fn fetch_debian(packages: &Path, dir: &Path) -> Result<()> {
    apt::download(&[DEBIAN_CLIENT.to_owned()], packages)?;
    apt::unpack(packages, dir)
}
