//! The Helm chart as a package, with the content that `helm package` gives it.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::{
    VERSION,
    contents::File,
    tarball::{gzip, tar},
};
use crate::{build, workspace::root};

const CHART: &str = "deploy/helm/imds-agent";
const METADATA: &str = "Chart.yaml";
const ICON: &str = "icon.svg";
/// Line of Chart.yaml to which the URL of the maintainers is added.
const MAINTAINERS: &str = "  - name: The imds-agent maintainers\n";

/// A packed chart.
pub(crate) struct Chart {
    /// Content of Chart.yaml.
    pub(super) metadata: Value,
    /// Archive that `helm install` accepts.
    pub(crate) package: Vec<u8>,
}

impl Chart {
    /// Reads the chart. With a repository, the metadata names its home, sources, maintainers and icon.
    pub(crate) fn read(repository: Option<&str>) -> Result<Self> {
        let dir = root().join(CHART);
        let path = dir.join(METADATA);
        let mut text =
            fs::read_to_string(&path).with_context(|| format!("failed to read {}", path.display()))?;
        if let Some(url) = repository {
            text = with_publisher(&text, url)?;
        }
        let metadata = serde_saphyr::from_str(&text).context("failed to parse Chart.yaml")?;
        let mut files = Vec::new();
        collect(&dir, "imds-agent", &mut files)?;
        let name = format!("imds-agent/{METADATA}");
        let file = files.iter_mut().find(|file| file.path == name).context("the chart has no Chart.yaml")?;
        file.data = text.into_bytes();
        files.sort_by(|one, other| one.path.cmp(&other.path));
        Ok(Self { metadata, package: gzip(&tar(&files, build::time()?)?)? })
    }
}

/// Parses the URL of a repository. The allowed characters need no quotes in YAML.
pub(super) fn repository_url(text: &str) -> Result<String> {
    let rest = text.strip_prefix("https://").context("the URL does not start with https://")?;
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-._~/:".contains(c);
    ensure!(
        !rest.is_empty() && rest.chars().all(is_plain),
        "the URL has characters other than A-Z a-z 0-9 - . _ ~ / :"
    );
    Ok(text.trim_end_matches('/').to_owned())
}

/// Adds the publisher's values to the text of Chart.yaml, which ends with the annotations.
fn with_publisher(text: &str, url: &str) -> Result<String> {
    ensure!(text.contains(MAINTAINERS), "{CHART}/{METADATA} has other maintainers");
    let text = text.replace(MAINTAINERS, &format!("{MAINTAINERS}    url: {url}\n"));
    Ok(format!(
        "{text}  artifacthub.io/links: |\n    - name: source\n      url: {url}\n    \
         - name: support\n      url: {url}/issues\nhome: {url}\nsources:\n  - {url}\n\
         icon: {url}/raw/v{VERSION}/{CHART}/{ICON}\n"
    ))
}

fn collect(dir: &Path, path: &str, files: &mut Vec<File>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("failed to list {}", dir.display()))? {
        let entry = entry?;
        let path = format!("{path}/{}", entry.file_name().to_string_lossy());
        if entry.file_type()?.is_dir() {
            collect(&entry.path(), &path, files)?;
        } else {
            files.push(File { path, mode: 0o644, data: fs::read(entry.path())? });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn publisher_is_in_the_metadata() {
        let url = repository_url("https://git.example.com/team/imds-agent/").unwrap();
        let (chart, plain) = (Chart::read(Some(&url)).unwrap(), Chart::read(None).unwrap().metadata);
        let metadata = chart.metadata;
        assert_eq!((&metadata["home"], &metadata["sources"][0]), (&url.as_str().into(), &metadata["home"]));
        assert_eq!(metadata["maintainers"][0]["url"], url);
        assert_eq!(metadata["maintainers"][0]["name"], plain["maintainers"][0]["name"]);
        let icon =
            metadata["icon"].as_str().unwrap().strip_prefix(&format!("{url}/raw/v{VERSION}/")).unwrap();
        assert!(root().join(icon).exists(), "{icon}");
        let links = metadata["annotations"]["artifacthub.io/links"].as_str().unwrap();
        let links: Value = serde_saphyr::from_str(links).unwrap();
        assert_eq!(links[1]["url"], format!("{url}/issues"));
        assert!(plain["home"].is_null() && plain["icon"].is_null());
        for wrong in ["http://a.example", "https://", "https://a.example/#x", "https://a.example/ x"] {
            repository_url(wrong).unwrap_err();
        }
    }
}
