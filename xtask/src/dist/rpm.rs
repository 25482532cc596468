//! The RPM package, built with rpmbuild.

use std::{
    fmt::Write as _,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use super::contents::Contents;
use crate::{
    arch::Arch,
    build,
    workspace::{execute, root},
};

/// Builds the package of one architecture and version in `dir`, and returns its path.
pub(super) fn write(arch: Arch, version: &str, contents: &Contents, dir: &Path) -> Result<PathBuf> {
    let work = dir.join("rpm");
    let _ = fs::remove_dir_all(&work);
    let staging = work.join("staging");
    let mut list = String::new();
    for dir in ["/etc/imds-agent", "/usr/share/doc/imds-agent"] {
        writeln!(list, "%dir %attr(755, root, root) {dir}")?;
    }
    for file in &contents.files {
        let path = staging.join(&file.path);
        fs::create_dir_all(path.parent().context("a file is below a directory")?)?;
        fs::write(&path, &file.data).with_context(|| format!("failed to write {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(file.mode))?;
        let path = format!("/{}", file.path);
        let kind = match path.as_str() {
            _ if contents.conf_files.contains(&path) => "%config(noreplace) ",
            _ if path.starts_with("/usr/share/licenses/") => "%license ",
            _ if path.starts_with("/usr/share/doc/") || path.starts_with("/usr/share/man/") => "%doc ",
            _ => "",
        };
        writeln!(list, "{kind}%attr({:o}, root, root) {path}", file.mode)?;
    }
    let files = work.join("files");
    fs::write(&files, list).with_context(|| format!("failed to write {}", files.display()))?;

    let name = file_name(arch, version);
    let mut macros = String::new();
    for (name, value) in [
        ("_topdir", work.to_string_lossy().as_ref()),
        ("_rpmdir", dir.to_string_lossy().as_ref()),
        ("_rpmfilename", &name),
        ("package_staging", staging.to_string_lossy().as_ref()),
        ("package_files", files.to_string_lossy().as_ref()),
        // A pre-release precedes its release.
        ("package_version", &version.replace('-', "~")),
        ("package_summary", &contents.summary),
        ("package_description", &contents.description),
    ] {
        writeln!(macros, "%{name} {}", value.replace('\n', "\\\n"))?;
    }
    let macro_file = work.join("macros");
    fs::write(&macro_file, macros).with_context(|| format!("failed to write {}", macro_file.display()))?;
    let mut rpmbuild = Command::new("rpmbuild");
    rpmbuild.args(["-bb", "--quiet", "--target", &format!("{}-linux", arch.machine())]);
    rpmbuild.args(["--define", &format!("package_macros {}", macro_file.display())]);
    rpmbuild.arg(root().join("deploy/rpm/imds-agent.spec"));
    execute(rpmbuild.env("SOURCE_DATE_EPOCH", build::time()?.to_string()))?;
    fs::remove_dir_all(&work).with_context(|| format!("failed to remove {}", work.display()))?;
    Ok(dir.join(name))
}

/// Returns the file name of the package of a version.
pub(super) fn file_name(arch: Arch, version: &str) -> String {
    format!("imds-agent-{version}-1.{}.rpm", arch.machine())
}
