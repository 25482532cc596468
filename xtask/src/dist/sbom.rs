//! SBOM of the binary in `CycloneDX` 1.5 format: the crates of the agent and of the embedded BPF object. Two builds of
//! the same commit give the same SBOM.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::workspace::{cargo, output_of, root};

/// Crates in the binary whose dependencies are listed.
const ROOTS: [&str; 2] = ["imds-agent", "imds-ebpf"];

/// Used part of the output of `cargo metadata`.
#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    resolve: Resolve,
}

#[derive(Deserialize)]
struct Package {
    id: String,
    name: String,
    version: String,
    license: Option<String>,
    repository: Option<String>,
    source: Option<String>,
}

#[derive(Deserialize)]
struct Resolve {
    nodes: Vec<Node>,
}

#[derive(Deserialize)]
struct Node {
    id: String,
    deps: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    pkg: String,
    dep_kinds: Vec<DependencyKind>,
}

/// `None` for a normal dependency, otherwise `build` or `dev`, which are not linked.
#[derive(Deserialize)]
struct DependencyKind {
    kind: Option<String>,
}

/// Used part of Cargo.lock.
#[derive(Deserialize)]
struct Lock {
    package: Vec<Locked>,
}

#[derive(Deserialize)]
struct Locked {
    name: String,
    version: String,
    checksum: Option<String>,
}

/// Returns the SBOM of the agent for the target `triple`. `sha256` is the checksum of the binary.
pub(super) fn agent_sbom(triple: &str, sha256: &str) -> Result<String> {
    let mut metadata = cargo("metadata");
    metadata.args(["--format-version", "1", "--locked", "--filter-platform", triple]).current_dir(root());
    let metadata = serde_json::from_str(&output_of(&mut metadata)?)
        .context("failed to parse the output of cargo metadata")?;
    let lock = fs::read_to_string(root().join("Cargo.lock")).context("failed to read Cargo.lock")?;
    let lock = toml::from_str(&lock).context("failed to read Cargo.lock")?;
    let sbom = describe(&metadata, &lock, sha256)?;
    Ok(format!("{}\n", serde_json::to_string_pretty(&sbom)?))
}

fn describe(metadata: &Metadata, lock: &Lock, sha256: &str) -> Result<Value> {
    let packages: BTreeMap<_, _> =
        metadata.packages.iter().map(|package| (package.id.as_str(), package)).collect();
    let linked: BTreeMap<_, Vec<_>> =
        metadata.resolve.nodes.iter().map(|node| (node.id.as_str(), node.linked())).collect();
    let checksums: BTreeMap<_, _> = lock
        .package
        .iter()
        .filter_map(|locked| Some(((&*locked.name, &*locked.version), locked.checksum.as_deref()?)))
        .collect();

    let is_root = |package: &&Package| package.source.is_none() && ROOTS.contains(&&*package.name);
    let mut left: Vec<&str> = metadata.packages.iter().filter(is_root).map(|package| &*package.id).collect();
    ensure!(left.len() == ROOTS.len(), "the workspace must contain {ROOTS:?}");
    let mut found = BTreeSet::new();
    while let Some(id) = left.pop() {
        if found.insert(id) {
            left.extend(&linked[id]);
        }
    }
    // Sorted by name, because paths differ between machines.
    let mut found: Vec<&Package> = found.into_iter().map(|id| packages[id]).collect();
    found.sort_by_key(|package| (&package.name, &package.version));

    let agent = found
        .iter()
        .find(|package| package.name == ROOTS[0])
        .context("the agent is missing in the dependency graph")?;
    let component = |package: &Package| {
        let mut component = json!({
            "type": "library",
            "bom-ref": package.purl(),
            "name": package.name,
            "version": package.version,
            "purl": package.purl(),
        });
        if let Some(license) = &package.license {
            // Slashes are the notation from before Cargo required SPDX expressions.
            component["licenses"] =
                json!([{ "expression": license.replace('/', " OR ").replace("  ", " ") }]);
        }
        if let Some(checksum) = checksums.get(&(&*package.name, &*package.version)) {
            component["hashes"] = json!([{ "alg": "SHA-256", "content": checksum }]);
        }
        if let Some(repository) = &package.repository {
            component["externalReferences"] = json!([{ "type": "vcs", "url": repository }]);
        }
        component
    };
    let mut main = component(agent);
    main["type"] = "application".into();
    main["hashes"] = json!([{ "alg": "SHA-256", "content": sha256 }]);
    let dependencies = found.iter().map(|package| {
        let mut on: Vec<_> = linked[&*package.id].iter().map(|id| packages[id].purl()).collect();
        if package.id == agent.id {
            // The build script of the agent embeds this crate.
            on.extend(found.iter().filter(|package| package.name == ROOTS[1]).map(|package| package.purl()));
        }
        on.sort();
        on.dedup();
        json!({ "ref": package.purl(), "dependsOn": on })
    });
    Ok(json!({
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": { "component": main },
        "components": found.iter().filter(|package| package.id != agent.id).map(|package| component(package)).collect::<Vec<_>>(),
        "dependencies": dependencies.collect::<Vec<_>>(),
    }))
}

impl Package {
    /// Returns the package URL (purl) of the crate.
    fn purl(&self) -> String {
        format!("pkg:cargo/{}@{}", self.name, self.version)
    }
}

impl Node {
    /// Returns the ids of the crates that are linked with this one.
    fn linked(&self) -> Vec<&str> {
        let is_linked =
            |dependency: &&Dependency| dependency.dep_kinds.iter().any(|kind| kind.kind.is_none());
        self.deps.iter().filter(is_linked).map(|dependency| &*dependency.pkg).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(name: &str, source: Option<&str>) -> Value {
        json!({ "id": format!("{name}#1"), "name": name, "version": "1.0.0", "license": "MIT/Apache-2.0",
                "repository": null, "source": source })
    }

    #[test]
    fn only_linked_crates_are_listed() {
        let on = |name: &str, kind: Option<&str>| json!({ "pkg": format!("{name}#1"), "dep_kinds": [{ "kind": kind }] });
        let metadata = json!({
            "packages": [
                package("imds-agent", None), package("imds-ebpf", None), package("aya", Some("registry")),
                package("cc", Some("registry")), package("xtask", None),
            ],
            "resolve": { "nodes": [
                { "id": "imds-agent#1", "deps": [on("aya", None), on("cc", Some("build"))] },
                { "id": "imds-ebpf#1", "deps": [] }, { "id": "aya#1", "deps": [] }, { "id": "cc#1", "deps": [] },
                { "id": "xtask#1", "deps": [on("imds-agent", None)] },
            ] },
        });
        let lock = json!({ "package": [{ "name": "aya", "version": "1.0.0", "checksum": "abc" }] });
        let sbom = describe(
            &serde_json::from_value(metadata).unwrap(),
            &serde_json::from_value(lock).unwrap(),
            "123",
        )
        .unwrap();
        let names: Vec<_> = sbom["components"]
            .as_array()
            .unwrap()
            .iter()
            .map(|component| component["name"].clone())
            .collect();
        assert_eq!(names, ["aya", "imds-ebpf"]);
        assert_eq!(sbom["components"][0]["hashes"][0]["content"], "abc");
        assert_eq!(sbom["components"][0]["licenses"][0]["expression"], "MIT OR Apache-2.0");
        assert_eq!(sbom["metadata"]["component"]["hashes"][0]["content"], "123");
        assert_eq!(
            sbom["dependencies"][1],
            json!({ "ref": "pkg:cargo/imds-agent@1.0.0",
                    "dependsOn": ["pkg:cargo/aya@1.0.0", "pkg:cargo/imds-ebpf@1.0.0"] })
        );
    }
}
