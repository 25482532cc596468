//! The Helm chart as a package, with the content that `helm package` gives it.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::{
    contents::File,
    tarball::{gzip, tar},
};
use crate::{build, workspace::root};

const CHART: &str = "deploy/helm/imds-agent";

/// A packed chart.
pub(crate) struct Chart {
    /// Content of Chart.yaml.
    pub(super) metadata: Value,
    /// Archive that `helm install` accepts.
    pub(crate) package: Vec<u8>,
}

impl Chart {
    pub(crate) fn read() -> Result<Self> {
        let dir = root().join(CHART);
        let path = dir.join("Chart.yaml");
        let metadata =
            fs::read_to_string(&path).with_context(|| format!("failed to read {}", path.display()))?;
        let metadata = serde_saphyr::from_str(&metadata).context("failed to parse Chart.yaml")?;
        let mut files = Vec::new();
        collect(&dir, "imds-agent", &mut files)?;
        files.sort_by(|one, other| one.path.cmp(&other.path));
        Ok(Self { metadata, package: gzip(&tar(&files, build::time()?)?)? })
    }
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
