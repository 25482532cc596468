//! Files that a package installs. The list of the Debian package in `imds-agent/Cargo.toml` also describes the tarball and
//! the RPM package.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use serde::Deserialize;

use super::tarball::gzip;
use crate::workspace::root;

/// Files that Debian packages have at another path or in another form.
const OTHERS: [(&str, &str); 6] = [
    ("deploy/systemd/imds-agent.service", "usr/lib/systemd/system/"),
    ("CHANGELOG.md", "usr/share/doc/imds-agent/"),
    ("LICENSE", "usr/share/licenses/imds-agent/"),
    ("LICENSE-APACHE", "usr/share/licenses/imds-agent/"),
    ("LICENSE-MIT", "usr/share/licenses/imds-agent/"),
    ("target/dist/completions/_imds-agent", "usr/share/zsh/site-functions/"),
];
/// Directories with files for Debian only.
const DEBIAN_ONLY: [&str; 2] = ["usr/share/lintian/", "usr/share/zsh/vendor-completions/"];

/// A file of a package.
#[derive(Clone, Debug)]
pub(super) struct File {
    /// Path without the slash of the root directory.
    pub(super) path: String,
    pub(super) mode: u32,
    pub(super) data: Vec<u8>,
}

#[derive(Deserialize)]
struct Manifest {
    package: Package,
}

#[derive(Deserialize)]
struct Package {
    description: String,
    metadata: Metadata,
}

#[derive(Deserialize)]
struct Metadata {
    deb: Deb,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Deb {
    extended_description: String,
    conf_files: Vec<String>,
    /// Source, destination and mode.
    assets: Vec<(String, String, String)>,
}

/// Contents and description of the packages other than Debian's.
pub(super) struct Contents {
    /// Sorted by path.
    pub(super) files: Vec<File>,
    /// Absolute paths of the configuration files.
    pub(super) conf_files: Vec<String>,
    pub(super) summary: String,
    pub(super) description: String,
}

impl Contents {
    /// Reads the files: the binary and its SBOM from `binaries`, manual pages and completions from `manual`, and all
    /// others from the workspace.
    pub(super) fn read(binaries: &Path, manual: &Path) -> Result<Self> {
        let path = root().join("imds-agent/Cargo.toml");
        let text = fs::read_to_string(&path).with_context(|| format!("failed to read {}", path.display()))?;
        let Package { description: summary, metadata } =
            toml::from_str::<Manifest>(&text).context("failed to parse [package.metadata.deb]")?.package;
        let Deb { extended_description, conf_files, assets } = metadata.deb;
        let assets = assets.iter().map(|(source, to, mode)| (source.as_str(), to.as_str(), mode.as_str()));
        let mut files = Vec::new();
        for (source, to, mode) in assets
            .filter(|(_, to, _)| !DEBIAN_ONLY.iter().any(|dir| to.starts_with(dir)))
            .chain(OTHERS.map(|(source, to)| (source, to, "644")))
        {
            let mode = u32::from_str_radix(mode, 8).with_context(|| format!("wrong mode of {source}"))?;
            let source = source.trim_start_matches("../");
            let pattern = if let Some(name) = source.strip_prefix("target/release/") {
                binaries.join(name)
            } else if let Some(name) = source.strip_prefix("target/dist/") {
                manual.join(name)
            } else {
                root().join(source)
            };
            for path in matches(&pattern)? {
                files.push(File::read(&path, to, mode)?);
            }
        }
        files.sort_by(|one, other| one.path.cmp(&other.path));
        Ok(Self { files, conf_files, summary, description: extended_description.trim().to_owned() })
    }
}

impl File {
    /// Reads the file at `source`. Compresses manual pages.
    fn read(source: &Path, to: &str, mode: u32) -> Result<Self> {
        let mut data = fs::read(source).with_context(|| format!("failed to read {}", source.display()))?;
        let name = source.file_name().unwrap_or_default().to_string_lossy();
        let mut path = if to.ends_with('/') { format!("{to}{name}") } else { to.to_owned() };
        if to.starts_with("usr/share/man/") {
            data = gzip(&data)?;
            path.push_str(".gz");
        }
        Ok(Self { path, mode, data })
    }
}

/// Returns the files that `pattern` names: one, or all of a directory if its last part is `*`.
fn matches(pattern: &Path) -> Result<Vec<PathBuf>> {
    if !pattern.ends_with("*") {
        return Ok(vec![pattern.to_owned()]);
    }
    let dir = pattern.parent().unwrap_or(pattern);
    let entries = fs::read_dir(dir).with_context(|| format!("failed to list {}", dir.display()))?;
    entries.map(|entry| Ok(entry?.path())).collect()
}
