//! Packages and archives of a stand-in for the binary.

use std::{collections::BTreeMap, fs, path::Path, process::Command};

use flate2::read::GzDecoder;
use imds_tests::lacks_program;
use tempfile::TempDir;

use super::{VERSION, contents::Contents, rpm, tarball};
use crate::{arch::Arch, workspace::output_of};

/// Directory with a stand-in for each built file.
fn built() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (path, text) in [
        ("imds-agent", "#!/bin/sh\necho stand-in\n"),
        ("imds-agent.cdx.json", "{}"),
        ("man/imds-agent.1", ".TH imds-agent 1"),
        ("completions/imds-agent", "complete"),
        ("completions/_imds-agent", "#compdef"),
        ("completions/imds-agent.fish", "complete"),
    ] {
        let path = dir.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    dir
}

fn contents(dir: &Path) -> Contents {
    Contents::read(dir, dir).unwrap()
}

/// Returns the mode of each file of a tarball.
fn modes(path: &Path, time: u64) -> BTreeMap<String, u32> {
    let mut tar = tar::Archive::new(GzDecoder::new(fs::File::open(path).unwrap()));
    let mut modes = Vec::new();
    for entry in tar.entries().unwrap() {
        let entry = entry.unwrap();
        let header = entry.header();
        assert_eq!((header.uid().unwrap(), header.gid().unwrap(), header.mtime().unwrap()), (0, 0, time));
        modes.push((entry.path().unwrap().to_str().unwrap().to_owned(), header.mode().unwrap()));
    }
    assert!(modes.is_sorted());
    modes.into_iter().collect()
}

#[test]
fn tarball_is_reproducible_and_complete() {
    let (dir, other) = (built(), built());
    let first = tarball::write(Arch::Amd64, &contents(dir.path()), dir.path()).unwrap();
    let second = tarball::write(Arch::Amd64, &contents(other.path()), other.path()).unwrap();
    assert_eq!(fs::read(&first).unwrap(), fs::read(second).unwrap());
    let modes = modes(&first, crate::build::time().unwrap());
    for (path, mode) in [
        ("usr/bin/imds-agent", 0o755),
        ("etc/imds-agent/imds.toml", 0o644),
        ("usr/lib/systemd/system/imds-agent.service", 0o644),
        ("usr/share/man/man1/imds-agent.1.gz", 0o644),
        ("usr/share/zsh/site-functions/_imds-agent", 0o644),
        ("usr/share/doc/imds-agent/README.md", 0o644),
        ("usr/share/doc/imds-agent/prometheus/rules.yaml", 0o644),
        ("usr/share/licenses/imds-agent/LICENSE-MIT", 0o644),
    ] {
        let path = format!("imds-agent-{VERSION}-linux-amd64/{path}");
        assert_eq!(modes.get(&path), Some(&mode), "{path}: {modes:?}");
    }
    assert!(!modes.keys().any(|path| path.contains("lintian")), "{modes:?}");
}

#[test]
fn rpm_package_is_reproducible_and_installable() {
    if lacks_program("the RPM package", &["rpmbuild", "rpm"]) {
        return;
    }
    let (dir, other) = (built(), built());
    let package = rpm::write(Arch::Arm64, &contents(dir.path()), dir.path()).unwrap();
    let again = rpm::write(Arch::Arm64, &contents(other.path()), other.path()).unwrap();
    assert_eq!(fs::read(&package).unwrap(), fs::read(again).unwrap());

    let query = |arguments: &[&str]| output_of(Command::new("rpm").arg("-qp").args(arguments).arg(&package));
    let list = query(&["--list"]).unwrap();
    for path in [
        "/usr/bin/imds-agent",
        "/usr/share/man/man1/imds-agent.1.gz",
        "/usr/share/licenses/imds-agent/LICENSE",
    ] {
        assert!(list.lines().any(|line| line == path), "{list}");
    }
    assert_eq!(query(&["--configfiles"]).unwrap(), "/etc/imds-agent/imds.toml\n");
    let format = "[%{FILEFLAGS:fflags} %{FILENAMES}\n]%{ARCH} %{BUILDHOST} %{DESCRIPTION}";
    let about = query(&["--queryformat", format]).unwrap();
    assert!(about.contains("cn /etc/imds-agent/imds.toml\n"), "{about}");
    assert!(about.contains("aarch64 localhost By default, every pod"), "{about}");
    assert!(about.ends_with("access."), "{about}");
    let scripts = query(&["--scripts"]).unwrap();
    for part in ["systemctl start imds-agent", "systemctl try-restart imds-agent", "imds-agent unload"] {
        assert!(scripts.contains(part), "{scripts}");
    }

    // A machine of another architecture can unpack the package, but not run its scripts.
    let machine = dir.path().join("machine");
    let mut install = Command::new("rpm");
    install.arg("--root").arg(&machine);
    output_of(install.args(["--install", "--nodeps", "--noscripts", "--ignorearch"]).arg(&package)).unwrap();
    let installed = fs::read_to_string(machine.join("usr/bin/imds-agent")).unwrap();
    assert!(installed.contains("stand-in"));
}
