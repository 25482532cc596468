//! The kubectl plugin: one tarball for each architecture, and the manifest for krew.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, ensure};

use super::{
    VERSION,
    contents::File,
    tarball::{gzip, tar},
};
use crate::{arch::Arch, build, workspace::root};

/// Package and binary.
pub(super) const PLUGIN: &str = "kubectl-imds";
/// Name of the manifest in a release.
pub(super) const MANIFEST: &str = "imds.yaml";
const LICENSES: [&str; 3] = ["LICENSE", "LICENSE-APACHE", "LICENSE-MIT"];

/// Returns the file name of the tarball.
pub(super) fn tarball_name(arch: Arch) -> String {
    format!("{PLUGIN}-{VERSION}-linux-{}.tar.gz", arch.debian())
}

/// Writes the tarball of one architecture to `dir`. krew links the binary at its root.
pub(super) fn write(arch: Arch, binary: &Path, dir: &Path) -> Result<()> {
    let file = |path: &Path, name: &str, mode| -> Result<File> {
        let data = fs::read(path).with_context(|| format!("failed to read {}", path.display()))?;
        Ok(File { path: name.to_owned(), mode, data })
    };
    let mut files =
        LICENSES.iter().map(|name| file(&root().join(name), name, 0o644)).collect::<Result<Vec<_>>>()?;
    files.push(file(binary, PLUGIN, 0o755)?);
    let path = dir.join(tarball_name(arch));
    fs::write(&path, gzip(&tar(&files, build::time()?)?)?)
        .with_context(|| format!("failed to write {}", path.display()))
}

/// Returns the manifest for tarballs below `url`, each with its checksum.
pub(super) fn manifest(url: &str, checksums: &[(Arch, String)]) -> Result<String> {
    let path = root().join("deploy/krew").join(MANIFEST);
    let template = fs::read_to_string(&path).with_context(|| format!("failed to read {}", path.display()))?;
    let url = url.replace("{version}", VERSION);
    let mut text = template.replace("{{VERSION}}", VERSION).replace("{{URL}}", url.trim_end_matches('/'));
    for (arch, checksum) in checksums {
        text = text.replace(&format!("{{{{SHA256_{}}}}}", arch.debian().to_uppercase()), checksum);
    }
    ensure!(!text.contains("{{"), "{} has an unknown placeholder", path.display());
    Ok(text)
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[test]
    fn manifest_names_each_tarball() {
        let checksums = [(Arch::Amd64, "ab".repeat(32)), (Arch::Arm64, "cd".repeat(32))];
        let text = manifest("https://releases.example.com/v{version}/", &checksums).unwrap();
        let manifest: Value = serde_saphyr::from_str(&text).unwrap();
        assert_eq!((&manifest["kind"], &manifest["metadata"]["name"]), (&"Plugin".into(), &"imds".into()));
        assert_eq!(manifest["spec"]["version"], format!("v{VERSION}"));
        for (platform, (arch, checksum)) in
            manifest["spec"]["platforms"].as_array().unwrap().iter().zip(&checksums)
        {
            let url = format!("https://releases.example.com/v{VERSION}/{}", tarball_name(*arch));
            assert_eq!((&platform["uri"], &platform["sha256"]), (&url.into(), &checksum.as_str().into()));
            assert_eq!(platform["selector"]["matchLabels"]["arch"], arch.debian());
            assert_eq!(platform["bin"], PLUGIN);
        }
        assert!(super::manifest("u", &checksums[..1]).is_err());
    }

    #[test]
    fn role_grants_no_writes() {
        let text = fs::read_to_string(root().join("deploy/krew/rbac.yaml")).unwrap();
        let objects: Vec<Value> =
            text.split("\n---\n").map(|object| serde_saphyr::from_str(object).unwrap()).collect();
        let rules = objects.iter().filter_map(|object| object["rules"].as_array()).flatten();
        let mut number = 0;
        for rule in rules {
            number += 1;
            let is_exec = rule["resources"] == serde_json::json!(["pods/exec"]);
            let allowed: &[&str] = if is_exec { &["get", "create"] } else { &["list"] };
            let verbs = rule["verbs"].as_array().unwrap();
            assert!(verbs.iter().all(|verb| allowed.contains(&verb.as_str().unwrap())), "{rule}");
        }
        assert_eq!(number, 4);
    }
}
