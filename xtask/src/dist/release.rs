//! The command `cargo xtask release`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum as _;
use serde::Serialize;

use super::{Chart, SBOM, VERSION, chart, deb_name, oci, plugin, provenance, rpm, sha256, write_checksums};
use crate::{
    arch::Arch,
    build,
    setup::{self, Purpose},
    workspace::{artifacts, execute, print_status, root},
};

/// Build a release in target/dist/release: packages and tarballs of both architectures, image, Helm chart and installation
/// script, with manifest, provenance and checksums
#[derive(clap::Args)]
pub(crate) struct Release {
    /// Sign the checksums with this secret key of minisign
    #[arg(long, value_name = "FILE")]
    sign_key: Option<PathBuf>,
    /// URI of the builder in the provenance statement
    #[arg(long, value_name = "URI", default_value = "urn:imds-agent:builder:local")]
    builder_id: String,
    /// Directory of the release on a server, for the manifest of the kubectl plugin; `{version}` stands for the version
    /// [default: `BASE_URL` in deploy/install.sh]
    #[arg(long, value_name = "URL")]
    base_url: Option<String>,
    /// Repository of the sources on a server such as GitHub, for home, sources, maintainers and icon of the chart
    #[arg(long, value_name = "URL", value_parser = chart::repository_url)]
    repository: Option<String>,
    /// Pack the existing artifacts of `cargo xtask dist`
    #[arg(long)]
    no_build: bool,
}

/// A file of the release.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Artifact {
    pub(super) name: String,
    pub(super) kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) architecture: Option<&'static str>,
    pub(super) size: u64,
    pub(super) sha256: String,
}

impl Release {
    pub(crate) fn run(self) -> Result<()> {
        setup::ensure(Purpose::Dist)?;
        if let Some(key) = &self.sign_key {
            ensure!(key.exists(), "the key {} does not exist", key.display());
            ensure!(
                is_clean(&build::commit()),
                "refusing to sign a release of uncommitted changes: commit them first"
            );
        }
        let arches = Arch::value_variants();
        if !self.no_build {
            super::build_all(arches)?;
        }
        let dirs = arches.iter().map(|&arch| super::dir(arch)).collect::<Result<Vec<_>>>()?;
        for dir in &dirs {
            ensure_built_from(&build::commit(), &dir.join("imds-agent"))?;
        }
        let built: Vec<_> = arches.iter().copied().zip(dirs.iter().map(PathBuf::as_path)).collect();
        let dir = artifacts("dist")?.join("release");
        let base_url = match self.base_url {
            Some(url) => url,
            None => publisher_url(&fs::read_to_string(root().join("deploy/install.sh"))?),
        };
        write(&built, &dir, &self.builder_id, &base_url, self.repository.as_deref())?;
        if let Some(key) = &self.sign_key {
            sign(key, &dir)?;
        }
        print_status(format_args!("release in {}:", dir.display()));
        eprint!("{}", fs::read_to_string(dir.join("SHA256SUMS"))?);
        Ok(())
    }
}

fn is_clean(commit: &str) -> bool {
    !commit.ends_with("-dirty") && commit != "unknown"
}

/// Fails unless the binary names `commit`, which manifest and provenance name.
pub(super) fn ensure_built_from(commit: &str, binary: &Path) -> Result<()> {
    let bytes = fs::read(binary)
        .with_context(|| format!("failed to read {}: run cargo xtask dist", binary.display()))?;
    let text = format!("commit {commit}\n");
    let has_commit = bytes.windows(text.len()).any(|window| window == text.as_bytes());
    ensure!(has_commit, "{} was built from another commit: run cargo xtask release", binary.display());
    Ok(())
}

/// Writes the release to `dir` from the artifacts of each architecture.
pub(super) fn write(
    built: &[(Arch, &Path)],
    dir: &Path,
    builder_id: &str,
    base_url: &str,
    repository: Option<&str>,
) -> Result<()> {
    let _ = fs::remove_dir_all(dir);
    fs::create_dir_all(dir).with_context(|| format!("failed to create {}", dir.display()))?;
    let mut artifacts = Vec::new();
    let mut add = |name: String, kind, arch: Option<Arch>, data: Vec<u8>| -> Result<()> {
        let path = dir.join(&name);
        fs::write(&path, &data).with_context(|| format!("failed to write {}", path.display()))?;
        let architecture = arch.map(Arch::debian);
        artifacts.push(Artifact {
            name,
            kind,
            architecture,
            size: data.len() as u64,
            sha256: sha256(&path)?,
        });
        Ok(())
    };
    for &(arch, from) in built {
        let debian = arch.debian();
        let read = |name: &str| {
            let path = from.join(name);
            fs::read(&path)
                .with_context(|| format!("failed to read {}: run cargo xtask dist", path.display()))
        };
        for (kind, name) in [
            ("tarball", format!("imds-agent-{VERSION}-linux-{debian}.tar.gz")),
            ("deb", deb_name(arch)),
            ("rpm", rpm::file_name(arch, VERSION)),
            ("plugin", plugin::tarball_name(arch)),
        ] {
            let data = read(&name)?;
            add(name, kind, Some(arch), data)?;
        }
        add(format!("imds-agent-{VERSION}-linux-{debian}.cdx.json"), "sbom", Some(arch), read(SBOM)?)?;
    }
    add(format!("imds-agent-{VERSION}-oci.tar"), "image", None, oci::image(built)?)?;
    let chart = Chart::read(repository)?;
    add(format!("imds-agent-{VERSION}.tgz"), "chart", None, chart.package.clone())?;
    add(
        format!("imds-agent-chart-{VERSION}-oci.tar"),
        "chart-oci",
        None,
        oci::chart(&chart.metadata, chart.package)?,
    )?;
    let checksum =
        |&(arch, from): &(Arch, &Path)| Ok((arch, sha256(&from.join(plugin::tarball_name(arch)))?));
    let checksums = built.iter().map(checksum).collect::<Result<Vec<_>>>()?;
    let manifest = plugin::manifest(base_url, &checksums)?;
    add(plugin::MANIFEST.to_owned(), "krew", None, manifest.into_bytes())?;
    add("install.sh".to_owned(), "installer", None, fs::read(root().join("deploy/install.sh"))?)?;

    let manifest = serde_json::json!({
        "name": "imds-agent", "version": VERSION, "commit": build::commit(), "artifacts": artifacts,
    });
    fs::write(dir.join("manifest.json"), format!("{manifest:#}\n"))?;
    let changelog = fs::read_to_string(root().join("CHANGELOG.md")).context("failed to read CHANGELOG.md")?;
    fs::write(dir.join("notes.md"), notes(&changelog)?)?;
    let statement = provenance::statement(&artifacts, builder_id)?;
    fs::write(dir.join(format!("imds-agent-{VERSION}.intoto.jsonl")), format!("{statement}\n"))?;
    write_checksums(dir)?;
    Ok(())
}

/// Returns the section of this version, without its heading.
fn notes(changelog: &str) -> Result<String> {
    let mut sections = changelog.split("\n## ").skip(1);
    let section = sections.find(|section| section.split_whitespace().next() == Some(VERSION));
    let (_, text) = section
        .and_then(|section| section.split_once('\n'))
        .with_context(|| format!("CHANGELOG.md has no section for {VERSION}"))?;
    Ok(format!("{}\n", text.trim()))
}

/// Signs the checksums, which cover all other files. The comment has no time, so that the signature is reproducible. Fails if
/// the installation script has another public key.
pub(super) fn sign(key: &Path, dir: &Path) -> Result<()> {
    let sums = dir.join("SHA256SUMS");
    let mut minisign = Command::new("minisign");
    minisign.arg("-S").arg("-s").arg(key).args(["-t", &format!("imds-agent {VERSION}"), "-m"]);
    execute(minisign.arg(&sums)).context("failed to sign the checksums")?;
    let script = fs::read_to_string(dir.join("install.sh")).context("failed to read install.sh")?;
    let Some(public) = setting(&script, "PUBLIC_KEY") else {
        print_status("deploy/install.sh contains no public key: users need the option --public-key");
        return Ok(());
    };
    let mut verify = Command::new("minisign");
    verify.args(["-V", "-q", "-P", public, "-m"]);
    execute(verify.arg(&sums)).context("the public key in deploy/install.sh is another one")
}

/// Returns a value that the publisher has set in the installation script.
fn setting<'a>(script: &'a str, name: &str) -> Option<&'a str> {
    let value = script.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='))?;
    Some(value.trim_matches(['\'', '"'])).filter(|value| !value.is_empty())
}

/// Returns the directory from which the installation script downloads, or an example without one.
fn publisher_url(script: &str) -> String {
    setting(script, "BASE_URL").unwrap_or("https://releases.example.com/v{version}").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn downloads_have_the_url_of_the_publisher() {
        let script = "VERSION=0.1.0\nBASE_URL='https://example.org/v{version}'\n    BASE_URL=other\n";
        assert_eq!(publisher_url(script), "https://example.org/v{version}");
        assert_eq!(publisher_url("BASE_URL=\n"), "https://releases.example.com/v{version}");
    }

    #[test]
    fn notes_are_the_section_of_the_version() {
        let changelog = format!(
            "# Changelog\n\n## 9.9.9\n\nnew\n\n## {VERSION} - 2026\n\n### Added\n\n- all\n\n## 0.0.1\n\nold\n"
        );
        assert_eq!(notes(&changelog).unwrap(), "### Added\n\n- all\n");
        assert!(notes("# Changelog\n\n## 9.9.9\n\nnew\n").is_err());
    }
}
