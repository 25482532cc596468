//! What the binary is made of, as `CycloneDX` 1.5: the crates of the agent and those of the BPF object inside. There is nothing
//! in it that another build of the same commit would not have.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::workspace::{cargo, root};

/// What is in the binary, with all that these depend on.
const ROOTS: [&str; 2] = ["imds-agent", "imds-ebpf"];

/// What `cargo metadata` says.
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

/// `None` for what is linked in; `build` and `dev` are not.
#[derive(Deserialize)]
struct DependencyKind {
    kind: Option<String>,
}

/// What Cargo.lock says.
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

/// Of the agent for the target `triple`, whose binary has this SHA-256.
pub(super) fn of_agent(triple: &str, sha256: &str) -> Result<String> {
    let mut metadata = cargo("metadata");
    metadata.args(["--format-version", "1", "--locked", "--filter-platform", triple]).current_dir(root());
    let output = metadata.output().context("could not start cargo metadata")?;
    ensure!(
        output.status.success(),
        "cargo metadata failed: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    let metadata =
        serde_json::from_slice(&output.stdout).context("could not read what cargo metadata says")?;
    let lock = fs::read_to_string(root().join("Cargo.lock")).context("could not read Cargo.lock")?;
    let lock = toml::from_str(&lock).context("could not read Cargo.lock")?;
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
    ensure!(left.len() == ROOTS.len(), "{ROOTS:?} are not all in the workspace");
    let mut found = BTreeSet::new();
    while let Some(id) = left.pop() {
        if found.insert(id) {
            left.extend(&linked[id]);
        }
    }
    // By name, not by path.
    let mut found: Vec<&Package> = found.into_iter().map(|id| packages[id]).collect();
    found.sort_by_key(|package| (&package.name, &package.version));

    let agent = found.iter().find(|package| package.name == ROOTS[0]).context("the agent is not found")?;
    let component = |package: &Package| {
        let mut component = json!({
            "type": "library",
            "bom-ref": package.purl(),
            "name": package.name,
            "version": package.version,
            "purl": package.purl(),
        });
        if let Some(license) = &package.license {
            // Slashes are how it was written before SPDX expressions were asked for.
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
            // What its build script puts in.
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
    /// Its package URL.
    fn purl(&self) -> String {
        format!("pkg:cargo/{}@{}", self.name, self.version)
    }
}

impl Node {
    /// Ids of what is linked with it.
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
