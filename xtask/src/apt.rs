//! Installation and download of Debian packages with apt.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    cache,
    workspace::{execute, output_of, print_status},
};

/// Installs packages. Updates the package lists first if a package is unknown.
pub(crate) fn install(packages: &[String]) -> Result<()> {
    ensure_known(packages)?;
    // Does not remove conflicting packages, which only the user may do.
    let mut install = apt_get(&["install", "--yes", "--no-install-recommends", "--no-remove"]);
    execute(install.args(packages))
        .context("failed to install packages: if apt-get failed to fetch them, run `apt-get update` first")
}

/// Downloads packages and their missing dependencies to `dir`. Changes nothing else, and therefore ignores locks and
/// conflicts.
pub(crate) fn download(packages: &[String], dir: &Path) -> Result<()> {
    ensure_known(packages)?;
    let partial = dir.join("partial");
    fs::create_dir_all(&partial).with_context(|| format!("failed to create {}", partial.display()))?;
    let mut download = apt_get(&["install", "--yes", "--no-install-recommends", "--download-only"]);
    download.args(["-o", "Debug::NoLocking=true", "-o", "APT::Sandbox::User="]);
    download.arg("-o").arg(format!("Dir::Cache::Archives={}", dir.display()));
    execute(download.args(packages))
        .context("failed to download packages: is this machine online? If so, run `apt-get update` first")
}

/// Downloads packages with their missing dependencies, and unpacks them in `dir` of the cache.
pub(crate) fn unpack_to_cache(packages: &[String], dir: &Path) -> Result<()> {
    let names = packages.join(" and ");
    print_status(format_args!("downloading {names} to {}", dir.display()));
    cache::make(dir, |root, staging| {
        let downloads = staging.join("packages");
        download(packages, &downloads)?;
        unpack(&downloads, root)
    })
    .with_context(|| format!("failed to get {names}"))
}

/// Unpacks all packages of `dir` below `root`.
pub(crate) fn unpack(dir: &Path, root: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).context("failed to list the packages")? {
        let path = entry.context("failed to list the packages")?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            execute(Command::new("dpkg-deb").arg("--extract").arg(&path).arg(root))?;
        }
    }
    Ok(())
}

fn ensure_known(packages: &[String]) -> Result<()> {
    let mut unknown = without_candidate(packages)?;
    if !unknown.is_empty() {
        execute(&mut apt_get(&["update"])).context("apt-get update failed: is this machine online?")?;
        unknown = without_candidate(packages)?;
    }
    if !unknown.is_empty() {
        bail!("this distribution has no {} (Debian 12 with security updates does)", unknown.join(", "));
    }
    Ok(())
}

fn apt_get(arguments: &[&str]) -> Command {
    let mut apt_get = Command::new("apt-get");
    // Waits for another apt-get, such as unattended-upgrades.
    apt_get.args(arguments).args(["-o", "DPkg::Lock::Timeout=300"]);
    apt_get.env("DEBIAN_FRONTEND", "noninteractive").stdin(Stdio::null()).stdout(Stdio::null());
    apt_get
}

fn without_candidate(packages: &[String]) -> Result<Vec<&str>> {
    let policy = output_of(Command::new("apt-cache").arg("policy").args(packages).env("LC_ALL", "C"))?;
    Ok(packages.iter().map(String::as_str).filter(|package| !has_candidate(&policy, package)).collect())
}

/// Reports whether the output of `apt-cache policy` has an installable version of `package`.
fn has_candidate(policy: &str, package: &str) -> bool {
    let mut lines = policy.lines().skip_while(|line| line.strip_suffix(':') != Some(package)).skip(1);
    lines
        .find_map(|line| line.trim_start().strip_prefix("Candidate: "))
        .is_some_and(|version| version != "(none)")
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: &str = "\
rustc-web:
  Installed: (none)
  Candidate: (none)
  Version table:
bpftool:
  Installed: 7.1.0+6.1.192-2
  Candidate: 7.1.0+6.1.192-2
  Version table:
 *** 7.1.0+6.1.192-2 500
        500 http://deb.debian.org/debian-security bookworm-security/main amd64 Packages
";

    #[test]
    fn candidate_needs_a_version() {
        assert!(has_candidate(POLICY, "bpftool"));
        assert!(!has_candidate(POLICY, "rustc-web"));
        assert!(!has_candidate(POLICY, "rustc"));
        assert!(!has_candidate("", "bpftool"));
    }
}
