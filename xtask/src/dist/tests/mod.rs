//! Packages and archives of a stand-in for the binary.

mod workflow;

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Read as _},
    path::Path,
    process::Command,
};

use flate2::read::GzDecoder;
use imds_tests::lacks_program;
use serde_json::Value;
use tempfile::TempDir;

use super::{
    Chart, VERSION, cargo_deb,
    contents::{Contents, File},
    oci, plugin, release, rpm, sha256, tarball,
};
use crate::{
    arch::Arch,
    workspace::{output_of, root},
};

/// Directory with a stand-in for each built file.
fn built() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (path, text) in [
        ("imds-agent", "#!/bin/sh\necho stand-in\n"),
        ("imds-broker", "#!/bin/sh\necho stand-in\n"),
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
        ("usr/bin/imds-broker", 0o755),
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
fn documented_removal_covers_each_file() {
    let text = fs::read_to_string(root().join("docs/uninstall.md")).unwrap();
    let removed: Vec<_> = text
        .lines()
        .filter_map(|line| line.strip_prefix("    rm "))
        .flat_map(|arguments| arguments.split(' '))
        .collect();
    for File { path, .. } in contents(built().path()).files {
        let is_removed = |argument: &&str| {
            let (start, end) = argument.split_once('*').unwrap_or((argument, ""));
            let rest = format!("/{path}").strip_prefix(start).map(str::to_owned);
            rest.is_some_and(|rest| {
                rest.is_empty() || rest.starts_with('/') || (!end.is_empty() && rest.ends_with(end))
            })
        };
        assert!(removed.iter().any(is_removed), "{path}");
    }
}

#[test]
fn purge_keeps_the_state_of_another_agent() {
    let machine = tempfile::tempdir().unwrap();
    let path = |path: &str| machine.path().join(path);
    let script = fs::read_to_string(root().join("deploy/deb/postrm")).unwrap();
    let script = ["/etc/", "/var/"].iter().fold(script, |script, start| {
        script.replace(&format!(" {start}"), &format!(" {}{start}", machine.path().display()))
    });
    let purge = || output_of(Command::new("sh").args(["-c", &script, "postrm", "purge"])).unwrap();
    for directory in ["etc/imds-agent", "var/lib/imds-agent", "var/log/imds-agent"] {
        fs::create_dir_all(path(directory)).unwrap();
        fs::write(path(directory).join("file"), "").unwrap();
    }
    purge();
    assert!(path("var/lib/imds-agent/file").exists());
    fs::remove_file(path("var/lib/imds-agent/file")).unwrap();
    purge();
    for directory in ["etc", "var/lib", "var/log"] {
        assert_eq!(fs::read_dir(path(directory)).unwrap().count(), 0, "{directory}");
    }
}

#[test]
fn deb_package_has_the_time_of_the_commit() {
    let command = cargo_deb(Arch::Amd64, Path::new("dist")).unwrap();
    let (_, time) = command.get_envs().find(|(name, _)| *name == "SOURCE_DATE_EPOCH").unwrap();
    assert_eq!(time.unwrap().to_str().unwrap(), crate::build::time().unwrap().to_string());
}

#[test]
fn rpm_package_is_reproducible_and_installable() {
    if lacks_program("the RPM package", &["rpmbuild", "rpm"]) {
        return;
    }
    let (dir, other) = (built(), built());
    let package = rpm::write(Arch::Arm64, VERSION, &contents(dir.path()), dir.path()).unwrap();
    let again = rpm::write(Arch::Arm64, VERSION, &contents(other.path()), other.path()).unwrap();
    assert_eq!(fs::read(&package).unwrap(), fs::read(again).unwrap());

    let query = |arguments: &[&str]| output_of(Command::new("rpm").arg("-qp").args(arguments).arg(&package));
    let list = query(&["--list"]).unwrap();
    for path in [
        "/usr/bin/imds-agent",
        "/usr/bin/imds-broker",
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

#[test]
fn rpm_package_of_a_pre_release_is_older() {
    if lacks_program("the RPM package", &["rpmbuild", "rpm"]) {
        return;
    }
    let dir = built();
    let package = rpm::write(Arch::Amd64, "0.2.0-rc.1", &contents(dir.path()), dir.path()).unwrap();
    assert_eq!(package.file_name().unwrap(), "imds-agent-0.2.0-rc.1-1.x86_64.rpm");
    let version = output_of(Command::new("rpm").args(["-qp", "--queryformat", "%{VERSION}"]).arg(&package));
    let order = format!("%{{lua:print(rpm.vercmp('{}', '0.2.0'))}}", version.unwrap());
    assert_eq!(output_of(Command::new("rpm").args(["--eval", &order])).unwrap().trim(), "-1");
}

/// Unpacks an OCI layout, checks the digest of each blob, and returns the directory.
fn unpack(archive: &[u8]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    tar::Archive::new(archive).unpack(dir.path()).unwrap();
    for blob in fs::read_dir(dir.path().join("blobs/sha256")).unwrap() {
        let path = blob.unwrap().path();
        assert_eq!(sha256(&path).unwrap(), path.file_name().unwrap().to_str().unwrap());
    }
    dir
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// Returns the blob that a descriptor names.
fn blob(layout: &Path, descriptor: &Value) -> Value {
    let digest = descriptor["digest"].as_str().unwrap().strip_prefix("sha256:").unwrap();
    let path = layout.join("blobs/sha256").join(digest);
    assert_eq!(descriptor["size"].as_u64(), Some(fs::metadata(&path).unwrap().len()));
    json(&path)
}

#[test]
fn image_has_the_binary_of_each_architecture() {
    let (dir, other) = (built(), built());
    fs::write(other.path().join("imds-agent"), "other").unwrap();
    let image = || oci::image(&[(Arch::Amd64, dir.path()), (Arch::Arm64, other.path())]).unwrap();
    assert_eq!(image(), image());
    let layout = unpack(&image());
    let index = json(&layout.path().join("index.json"));
    let index = blob(layout.path(), &index["manifests"][0]);
    for (manifest, (arch, text)) in
        index["manifests"].as_array().unwrap().iter().zip([("amd64", "stand-in"), ("arm64", "other")])
    {
        assert_eq!(manifest["platform"]["architecture"], arch);
        let manifest = blob(layout.path(), manifest);
        let config = blob(layout.path(), &manifest["config"]);
        assert_eq!(config["architecture"], arch);
        assert_eq!(config["config"]["Entrypoint"][0], "/imds-agent");
        let layer = manifest["layers"][0]["digest"].as_str().unwrap().replace("sha256:", "blobs/sha256/");
        let layer = fs::File::open(layout.path().join(layer)).unwrap();
        let mut tar = tar::Archive::new(GzDecoder::new(layer));
        let files: Vec<_> = tar.entries().unwrap().map(|file| read(file.unwrap())).collect();
        let [(path, 0o755, data), (broker, 0o755, _)] = &files[..] else { panic!("{files:?}") };
        assert!(path == "imds-agent" && data.contains(text) && broker == "imds-broker", "{files:?}");
    }

    if !lacks_program("the image in skopeo", &["skopeo"]) {
        let copied = copy_with_skopeo(&image(), &["--all"]);
        assert_eq!(json(&copied.path().join("copy/manifest.json")), index);
    }
}

#[test]
fn chart_is_an_oci_artifact() {
    let chart = Chart::read(None).unwrap();
    assert_eq!(chart.package, Chart::read(None).unwrap().package);
    let files = tar::Archive::new(GzDecoder::new(&chart.package[..]))
        .entries()
        .unwrap()
        .map(|file| read(file.unwrap()).0)
        .collect::<Vec<_>>();
    for path in ["Chart.yaml", "files/rules.yaml", "templates/daemonset.yaml", "values.schema.json"] {
        assert!(files.contains(&format!("imds-agent/{path}")), "{files:?}");
    }
    let archive = oci::chart(&chart.metadata, chart.package).unwrap();
    let layout = unpack(&archive);
    let index = json(&layout.path().join("index.json"));
    assert_eq!(index["manifests"][0]["annotations"]["org.opencontainers.image.ref.name"], VERSION);
    let manifest = blob(layout.path(), &index["manifests"][0]);
    assert_eq!(manifest["layers"][0]["mediaType"], "application/vnd.cncf.helm.chart.content.v1.tar+gzip");
    let config = blob(layout.path(), &manifest["config"]);
    assert_eq!((&config["name"], &config["version"]), (&"imds-agent".into(), &VERSION.into()));
    assert!(config["keywords"].is_array(), "{config}");

    if !lacks_program("the chart in skopeo", &["skopeo"]) {
        let copied = copy_with_skopeo(&archive, &[]);
        assert_eq!(json(&copied.path().join("copy/manifest.json")), manifest);
    }
}

/// Returns path, mode and text of a file in an archive.
fn read(mut file: tar::Entry<'_, impl io::Read>) -> (String, u32, String) {
    let mut data = Vec::new();
    file.read_to_end(&mut data).unwrap();
    let path = file.path().unwrap().to_str().unwrap().to_owned();
    (path, file.header().mode().unwrap(), String::from_utf8_lossy(&data).into_owned())
}

/// Copies an OCI archive to the directory `copy`, as to a registry.
fn copy_with_skopeo(archive: &[u8], options: &[&str]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("oci.tar");
    fs::write(&path, archive).unwrap();
    let mut skopeo = Command::new("skopeo");
    skopeo.args(["copy", "--insecure-policy", "--quiet"]).args(options);
    skopeo.arg(format!("oci-archive:{}", path.display()));
    output_of(skopeo.arg(format!("dir:{}/copy", dir.path().display()))).unwrap();
    dir
}

/// Returns directories with a stand-in for each artifact of `cargo xtask dist`.
fn dist() -> [(Arch, TempDir); 2] {
    [Arch::Amd64, Arch::Arm64].map(|arch| {
        let dir = built();
        tarball::write(arch, &contents(dir.path()), dir.path()).unwrap();
        plugin::write(arch, &dir.path().join("imds-agent"), dir.path()).unwrap();
        for package in [
            format!("imds-agent_{VERSION}-1_{}.deb", arch.debian()),
            format!("imds-agent-{VERSION}-1.{}.rpm", arch.machine()),
        ] {
            fs::write(dir.path().join(package), "package").unwrap();
        }
        (arch, dir)
    })
}

/// Returns the directory of a release of stand-ins.
fn released() -> TempDir {
    let (built, dir) = (dist(), tempfile::tempdir().unwrap());
    let built = built.each_ref().map(|(arch, dir)| (*arch, dir.path()));
    release::write(&built, dir.path(), "urn:example:builder", "https://example.com/{version}", None).unwrap();
    dir
}

#[test]
fn release_lists_and_signs_each_file() {
    let (dir, other) = (released(), released());
    let sums = fs::read_to_string(dir.path().join("SHA256SUMS")).unwrap();
    assert_eq!(sums, fs::read_to_string(other.path().join("SHA256SUMS")).unwrap());
    output_of(Command::new("sha256sum").args(["--check", "--strict", "SHA256SUMS"]).current_dir(dir.path()))
        .unwrap();

    let manifest = json(&dir.path().join("manifest.json"));
    let artifacts = manifest["artifacts"].as_array().unwrap();
    let provenance = json(&dir.path().join(format!("imds-agent-{VERSION}.intoto.jsonl")));
    assert_eq!(provenance["subject"].as_array().unwrap().len(), artifacts.len());
    assert_eq!(provenance["predicate"]["runDetails"]["builder"]["id"], "urn:example:builder");
    for artifact in artifacts {
        let (name, digest) = (artifact["name"].as_str().unwrap(), artifact["sha256"].as_str().unwrap());
        assert!(sums.contains(&format!("{digest}  {name}\n")), "{name}");
        assert_eq!(artifact["size"].as_u64().unwrap(), fs::metadata(dir.path().join(name)).unwrap().len());
        assert!(
            provenance["subject"]
                .as_array()
                .unwrap()
                .iter()
                .any(|subject| { subject["name"] == name && subject["digest"]["sha256"] == digest })
        );
    }
    let of = |kind: &str| artifacts.iter().filter(|artifact| artifact["kind"] == kind).count();
    assert_eq!(
        ["tarball", "deb", "rpm", "plugin", "sbom", "image", "chart", "krew"].map(of),
        [2, 2, 2, 2, 2, 1, 1, 1]
    );
    // Manifest, notes and statement are in the checksums, too.
    assert_eq!(sums.lines().count(), artifacts.len() + 3);

    if lacks_program("the signature", &["minisign"]) {
        return;
    }
    let path = |name: &str| other.path().join(name);
    let mut generate = Command::new("minisign");
    generate.args(["-G", "-W", "-p"]).arg(path("key.pub")).arg("-s").arg(path("key"));
    output_of(&mut generate).unwrap();
    let signatures = [0, 1].map(|_| {
        release::sign(&path("key"), dir.path()).unwrap();
        fs::read(dir.path().join("SHA256SUMS.minisig")).unwrap()
    });
    assert_eq!(signatures[0], signatures[1]);
    let mut verify = Command::new("minisign");
    verify.arg("-V").arg("-p").arg(path("key.pub")).arg("-m").arg(dir.path().join("SHA256SUMS"));
    output_of(&mut verify).unwrap();

    // The script of a publisher must have the key that verifies the signature.
    let public = fs::read_to_string(path("key.pub")).unwrap();
    let public = public.lines().last().unwrap();
    for (key, is_right) in [(public.to_owned(), true), (public.replace("RW", "RX"), false)] {
        fs::write(dir.path().join("install.sh"), format!("PUBLIC_KEY={key}\n")).unwrap();
        assert_eq!(release::sign(&path("key"), dir.path()).is_ok(), is_right, "{key}");
    }
}

#[test]
fn binary_of_another_commit_is_refused() {
    let binary = tempfile::NamedTempFile::new().unwrap();
    fs::write(binary.path(), "imds-agent\0commit 0123abc\nbpf").unwrap();
    release::ensure_built_from("0123abc", binary.path()).unwrap();
    for other in ["0123ab", "0123abc-dirty", "4567def"] {
        release::ensure_built_from(other, binary.path()).unwrap_err();
    }
}
