//! OCI image layouts, as `skopeo`, `podman` and registries read them: the container image for all architectures, and the Helm
//! chart.

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::{
    VERSION,
    contents::File,
    tarball::{gzip, tar},
};
use crate::{arch::Arch, build, workspace::root};

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const CHART_CONFIG: &str = "application/vnd.cncf.helm.config.v1+json";
const CHART: &str = "application/vnd.cncf.helm.chart.content.v1.tar+gzip";

/// Content of a layout: blobs by SHA-256 digest.
#[derive(Default)]
struct Layout(BTreeMap<String, Vec<u8>>);

impl Layout {
    /// Adds a blob and returns its descriptor.
    fn add(&mut self, media_type: &str, data: Vec<u8>) -> Value {
        let digest = format!("{:x}", Sha256::digest(&data));
        let descriptor =
            json!({ "mediaType": media_type, "digest": format!("sha256:{digest}"), "size": data.len() });
        self.0.insert(digest, data);
        descriptor
    }

    fn add_json(&mut self, media_type: &str, value: &Value) -> Value {
        self.add(media_type, value.to_string().into_bytes())
    }

    /// Returns the layout as an archive whose only reference is `descriptor`, under `name`.
    fn archive(self, mut descriptor: Value, name: &str) -> Result<Vec<u8>> {
        descriptor["annotations"] = json!({ "org.opencontainers.image.ref.name": name });
        let index = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": [descriptor] });
        let file = |path: String, data| File { path, mode: 0o644, data };
        let blobs = self.0.into_iter().map(|(digest, data)| file(format!("blobs/sha256/{digest}"), data));
        let mut files: Vec<_> = blobs.collect();
        files.push(file("index.json".to_owned(), index.to_string().into_bytes()));
        let version = json!({ "imageLayoutVersion": "1.0.0" });
        files.push(file("oci-layout".to_owned(), version.to_string().into_bytes()));
        tar(&files, build::time()?)
    }
}

/// Returns the archive of the image. `binaries` are the directories with the files that the Containerfile copies.
pub(super) fn image(binaries: &[(Arch, &Path)]) -> Result<Vec<u8>> {
    let recipe = fs::read_to_string(root().join("deploy/image/Containerfile"))?;
    let recipe = Recipe::parse(&recipe).context("failed to read deploy/image/Containerfile")?;
    let created = created()?;
    let mut layout = Layout::default();
    let mut manifests = Vec::new();
    for (arch, dir) in binaries {
        let mut files = Vec::new();
        for (source, to) in &recipe.copies {
            let data = fs::read(dir.join(source)).with_context(|| format!("failed to read {source}"))?;
            files.push(File { path: to.trim_start_matches('/').to_owned(), mode: 0o755, data });
        }
        let layer = tar(&files, build::time()?)?;
        let diff = format!("sha256:{:x}", Sha256::digest(&layer));
        let layer = layout.add(LAYER, gzip(&layer)?);
        let config = json!({
            "created": created,
            "architecture": arch.debian(),
            "os": "linux",
            "config": { "Entrypoint": recipe.entrypoint, "Cmd": recipe.cmd },
            "rootfs": { "type": "layers", "diff_ids": [diff] },
            "history": [{ "created": created, "created_by": "cargo xtask release" }],
        });
        let config = layout.add_json(CONFIG, &config);
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [layer],
            "annotations": annotations(&created, "Blocks pods and containers from the cloud instance metadata service"),
        });
        let mut manifest = layout.add_json(MANIFEST, &manifest);
        manifest["platform"] = json!({ "architecture": arch.debian(), "os": "linux" });
        manifests.push(manifest);
    }
    let index = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": manifests });
    let index = layout.add_json(INDEX, &index);
    // Podman and containerd store an imported image under this name.
    layout.archive(index, &format!("localhost/imds-agent:{VERSION}"))
}

/// Returns the archive of a chart: its metadata and its package, as `helm push` uploads them.
pub(super) fn chart(metadata: &Value, package: Vec<u8>) -> Result<Vec<u8>> {
    let mut layout = Layout::default();
    let config = layout.add_json(CHART_CONFIG, metadata);
    let package = layout.add(CHART, package);
    let description = metadata["description"].as_str().unwrap_or_default();
    let mut manifest = json!({
        "schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [package],
        "annotations": annotations(&created()?, description),
    });
    if let Some(home) = metadata["home"].as_str() {
        // `helm push` sets both, and registries link them.
        manifest["annotations"]["org.opencontainers.image.source"] = home.into();
        manifest["annotations"]["org.opencontainers.image.url"] = home.into();
    }
    let manifest = layout.add_json(MANIFEST, &manifest);
    layout.archive(manifest, VERSION)
}

fn annotations(created: &str, description: &str) -> Value {
    json!({
        "org.opencontainers.image.created": created,
        "org.opencontainers.image.description": description,
        "org.opencontainers.image.licenses": "Apache-2.0 OR MIT",
        "org.opencontainers.image.revision": build::commit(),
        "org.opencontainers.image.title": "imds-agent",
        "org.opencontainers.image.version": VERSION,
    })
}

/// Returns the time of the commit, so that two builds give the same image.
fn created() -> Result<String> {
    Ok(jiff::Timestamp::from_second(build::time()?.try_into()?)?.to_string())
}

/// Used part of a Containerfile.
#[derive(Debug, Default, PartialEq)]
struct Recipe {
    /// Name in the build directory, and path in the image.
    copies: Vec<(String, String)>,
    entrypoint: Vec<String>,
    cmd: Vec<String>,
}

impl Recipe {
    fn parse(text: &str) -> Result<Self> {
        let mut recipe = Self::default();
        for line in text.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
            match line.split_once(' ') {
                Some(("FROM", "scratch")) => {}
                Some(("COPY", paths)) => {
                    let (source, to) = paths.split_once(' ').context("COPY needs two paths")?;
                    recipe.copies.push((source.to_owned(), to.to_owned()));
                }
                Some(("ENTRYPOINT", list)) => recipe.entrypoint = serde_json::from_str(list)?,
                Some(("CMD", list)) => recipe.cmd = serde_json::from_str(list)?,
                _ => bail!("unknown instruction {line:?}"),
            }
        }
        Ok(recipe)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_without_effect_on_image_are_rejected() {
        let recipe =
            Recipe::parse("# c\nFROM scratch\nCOPY a /b\nENTRYPOINT [\"/b\"]\nCMD [\"run\"]\n").unwrap();
        assert_eq!(recipe.copies, [("a".to_owned(), "/b".to_owned())]);
        assert_eq!((recipe.entrypoint, recipe.cmd), (vec!["/b".to_owned()], vec!["run".to_owned()]));
        for wrong in ["FROM debian", "FROM scratch\nUSER 1", "COPY a", "CMD run"] {
            assert!(Recipe::parse(wrong).is_err(), "{wrong}");
        }
    }
}
