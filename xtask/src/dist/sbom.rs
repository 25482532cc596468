//! SBOM of the binary in `CycloneDX` 1.5 format: the crates of the agent and of the embedded BPF object. Two builds of
//! the same commit give the same SBOM.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use anyhow::{Context as _, Result, ensure};
use cargo_metadata::{DependencyKind, Metadata, Node, NodeDep, Package, PackageId, semver::Version};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::workspace::{cargo, output_of, root};

/// Crates in the binary whose dependencies are listed.
const ROOTS: [&str; 2] = ["imds-agent", "imds-ebpf"];

/// Used part of Cargo.lock.
#[derive(Deserialize)]
struct Lock {
    package: Vec<Locked>,
}

#[derive(Deserialize)]
struct Locked {
    name: String,
    version: Version,
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
    let selected = selected(triple)?;
    let is_selected =
        |package: &Package| selected.contains(&format!("{} v{}", package.name, package.version));
    let sbom = describe(&metadata, &lock, sha256, is_selected)?;
    Ok(format!("{}\n", serde_json::to_string_pretty(&sbom)?))
}

/// Returns names and versions of the crates that are built if only the agent is. `cargo metadata` selects the features of all
/// packages of the workspace, so that libraries of the agent appear with dependencies that only other packages need.
fn selected(triple: &str) -> Result<BTreeSet<String>> {
    let mut tree = cargo("tree");
    tree.args(["--locked", "--target", triple, "--edges", "normal", "--prefix", "none", "--format", "{p}"]);
    tree.args(ROOTS.iter().flat_map(|name| ["--package", name])).current_dir(root());
    let name = |line: &str| line.split(' ').take(2).collect::<Vec<_>>().join(" ");
    Ok(output_of(&mut tree)?.lines().filter(|line| !line.is_empty()).map(name).collect())
}

fn describe(
    metadata: &Metadata,
    lock: &Lock,
    sha256: &str,
    is_selected: impl Fn(&Package) -> bool,
) -> Result<Value> {
    let packages: BTreeMap<_, _> = metadata.packages.iter().map(|package| (&package.id, package)).collect();
    let nodes = &metadata.resolve.as_ref().context("cargo metadata has resolved no dependencies")?.nodes;
    let linked = |node| -> Vec<_> {
        linked(node)
            .into_iter()
            .filter(|id| packages.get(id).is_some_and(|package| is_selected(package)))
            .collect()
    };
    let linked: BTreeMap<_, _> = nodes.iter().map(|node| (&node.id, linked(node))).collect();
    let checksums: BTreeMap<_, _> = lock
        .package
        .iter()
        .filter_map(|locked| Some(((&*locked.name, locked.version.clone()), locked.checksum.as_deref()?)))
        .collect();

    let is_root = |package: &&Package| package.source.is_none() && ROOTS.contains(&package.name.as_str());
    let mut left: Vec<_> = metadata.packages.iter().filter(is_root).map(|package| &package.id).collect();
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
            "bom-ref": purl(package),
            "name": package.name,
            "version": package.version,
            "purl": purl(package),
        });
        if let Some(license) = &package.license {
            // Slashes are the notation from before Cargo required SPDX expressions.
            component["licenses"] =
                json!([{ "expression": license.replace('/', " OR ").replace("  ", " ") }]);
        }
        if let Some(checksum) = checksums.get(&(package.name.as_str(), package.version.clone())) {
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
        let mut on: Vec<_> = linked[&package.id].iter().map(|id| purl(packages[id])).collect();
        if package.id == agent.id {
            // The build script of the agent embeds this crate.
            on.extend(found.iter().filter(|package| package.name == ROOTS[1]).map(|package| purl(package)));
        }
        on.sort();
        on.dedup();
        json!({ "ref": purl(package), "dependsOn": on })
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

/// Returns the package URL (purl) of the crate.
fn purl(package: &Package) -> String {
    format!("pkg:cargo/{}@{}", package.name, package.version)
}

/// Returns the ids of the crates that are linked with this one.
fn linked(node: &Node) -> Vec<&PackageId> {
    let is_linked =
        |dependency: &&NodeDep| dependency.dep_kinds.iter().any(|kind| kind.kind == DependencyKind::Normal);
    node.deps.iter().filter(is_linked).map(|dependency| &dependency.pkg).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(name: &str, source: Option<&str>) -> Value {
        json!({ "id": format!("{name}#1"), "name": name, "version": "1.0.0", "license": "MIT/Apache-2.0",
                "repository": null, "source": source, "dependencies": [], "targets": [], "features": {},
                "manifest_path": "/Cargo.toml" })
    }

    #[test]
    fn only_linked_crates_are_listed() {
        let on = |name: &str, kind: Option<&str>| json!({ "name": name, "pkg": format!("{name}#1"), "dep_kinds": [{ "kind": kind, "target": null }] });
        let node = |name: &str, deps: &[Value]| json!({ "id": format!("{name}#1"), "dependencies": [], "deps": deps });
        let metadata = json!({
            "packages": [
                package("imds-agent", None), package("imds-ebpf", None), package("aya", Some("registry")),
                package("cc", Some("registry")), package("ws", Some("registry")), package("xtask", None),
            ],
            "resolve": { "nodes": [
                node("imds-agent", &[on("aya", None), on("cc", Some("build"))]), node("imds-ebpf", &[]),
                node("aya", &[on("ws", None)]), node("cc", &[]), node("ws", &[]), node("xtask", &[on("imds-agent", None)]),
            ] },
            "version": 1, "workspace_members": [], "workspace_root": "/", "target_directory": "/target",
        });
        let lock = json!({ "package": [{ "name": "aya", "version": "1.0.0", "checksum": "abc" }] });
        let sbom = describe(
            &serde_json::from_value(metadata).unwrap(),
            &serde_json::from_value(lock).unwrap(),
            "123",
            |package| package.name != "ws",
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
