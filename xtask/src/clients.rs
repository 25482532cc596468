//! Clients of the metadata service for `cargo xtask bench clients`: from `PyPI`, npm and Debian, in the cache.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::{
    apt, cache,
    workspace::{execute, print_status, root},
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

/// Libraries in a directory work wherever it is moved, unlike the programs of a virtual environment.
fn fetch_python(lists: &Path, dir: &Path) -> Result<()> {
    let mut pip = Command::new("python3");
    pip.args([
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-warn-conflicts",
        "--disable-pip-version-check",
        "--root-user-action",
        "ignore",
    ]);
    execute(pip.arg("--target").arg(dir).arg("--requirement").arg(lists.join("requirements.txt")))
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
    for entry in fs::read_dir(packages).context("failed to list the packages")? {
        let path = entry.context("failed to list the packages")?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            execute(Command::new("dpkg-deb").arg("--extract").args([&path, dir]))?;
        }
    }
    Ok(())
}
