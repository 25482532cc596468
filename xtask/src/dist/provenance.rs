//! Provenance of a release as an in-toto statement with the predicate SLSA provenance v1. Contains neither times nor names of
//! machines, so that two builds of the same commit give the same statement.

use std::process::Command;

use anyhow::Result;
use serde_json::{Value, json};

use super::{VERSION, release::Artifact, sha256};
use crate::{
    build,
    workspace::{output_of, root},
};

/// Returns the statement about `artifacts`, built by the service that `builder_id` names.
pub(super) fn statement(artifacts: &[Artifact], builder_id: &str) -> Result<Value> {
    let subject =
        |artifact: &Artifact| json!({ "name": artifact.name, "digest": { "sha256": artifact.sha256 } });
    let toolchain = output_of(Command::new("rustc").arg("--version").current_dir(root()))?;
    Ok(json!({
        "_type": "https://in-toto.io/Statement/v1",
        "subject": artifacts.iter().map(subject).collect::<Vec<_>>(),
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": "urn:imds-agent:build:xtask-release:v1",
                "externalParameters": { "command": "cargo xtask release", "version": VERSION },
                "resolvedDependencies": [
                    { "name": "source", "digest": { "gitCommit": build::commit() } },
                    { "name": "Cargo.lock", "digest": { "sha256": sha256(&root().join("Cargo.lock"))? } },
                    { "name": "rust", "uri": format!("pkg:generic/rust@{}", version(&toolchain)),
                      "annotations": { "version": toolchain.trim() } },
                ],
            },
            "runDetails": { "builder": { "id": builder_id } },
        },
    }))
}

/// Returns the number in the output of `rustc --version`.
fn version(toolchain: &str) -> &str {
    toolchain.split(' ').nth(1).unwrap_or_default()
}
