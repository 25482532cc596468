//! The object in the repository with the record of its inputs, and the choice between it and a build from source.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use sha2::{Digest as _, Sha256};

use crate::{Toolchain, object, sources, toolchain::OBJECT};

/// Directory of the stored object, relative to the workspace.
const PREBUILT: &str = "imds-ebpf/prebuilt";
/// Environment variable that makes build scripts compile the object.
const FROM_SOURCE: &str = "IMDS_EBPF_FROM_SOURCE";

/// BPF object with the record of its inputs: hash of the sources, hash of the object, and the versions of the toolchain.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Object {
    /// Content of the object.
    pub bytes: Vec<u8>,
    record: String,
}

/// File that [`build`] has written.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Built {
    /// Path of the file, in `OUT_DIR`.
    pub path: PathBuf,
    /// SHA-256 of the file, in hexadecimal.
    pub sha256: String,
}

/// Writes the object to `OUT_DIR`: the stored one if it matches the sources, otherwise one that is built from source. Call it
/// from a build script: it prints `cargo::rerun-if-changed` for all inputs.
pub fn build() -> Result<Built> {
    let variable = |name| env::var_os(name).with_context(|| format!("{name} is not set: build scripts only"));
    let manifest_dir = PathBuf::from(variable("CARGO_MANIFEST_DIR")?);
    let workspace = manifest_dir.parent().context("the crate has no parent directory")?;
    let out_dir = PathBuf::from(variable("OUT_DIR")?);
    println!("cargo::rerun-if-env-changed={FROM_SOURCE}");
    for path in sources::paths(workspace).chain([workspace.join(PREBUILT)]) {
        println!("cargo::rerun-if-changed={}", path.display());
    }

    let object = match current(workspace)? {
        Some(object) => object,
        None => Object::compile(workspace, &shared_target_dir(&out_dir)).with_context(|| {
            format!(
                "failed to build the BPF object from source, because {PREBUILT} does not match the \
                 sources or {FROM_SOURCE} is set"
            )
        })?,
    };
    let path = out_dir.join(OBJECT);
    fs::write(&path, &object.bytes).with_context(|| format!("failed to write {}", path.display()))?;
    Ok(Built { path, sha256: sha256(&object.bytes) })
}

/// Reports whether [`build`] compiles the programs, which needs the toolchain.
pub fn compiles_programs(workspace: &Path) -> Result<bool> {
    Ok(current(workspace)?.is_none())
}

/// Returns the stored object, unless it does not match the sources or the user wants a build from source.
fn current(workspace: &Path) -> Result<Option<Object>> {
    Ok(Object::stored(workspace)?.filter(|_| env::var_os(FROM_SOURCE).is_none()))
}

impl Object {
    /// Builds the object from source. `target_dir` is cargo's target directory for it.
    pub fn compile(workspace: &Path, target_dir: &Path) -> Result<Self> {
        let toolchain = Toolchain::detect()?;
        let bytes = object::compile(&toolchain, workspace, target_dir)?;
        let record = checksums(workspace, &bytes)? + &toolchain.versions()?;
        Ok(Self { bytes, record })
    }

    /// Returns the object in the repository, or `None` if its record does not match the object and the sources.
    pub fn stored(workspace: &Path) -> Result<Option<Self>> {
        let [object, record] = paths(workspace);
        let (Ok(bytes), Ok(record)) = (fs::read(object), fs::read_to_string(record)) else { return Ok(None) };
        let is_current = record.starts_with(&checksums(workspace, &bytes)?);
        Ok(is_current.then_some(Self { bytes, record }))
    }

    /// Stores the object in the repository and returns its path.
    pub fn store(&self, workspace: &Path) -> Result<PathBuf> {
        let [object, record] = paths(workspace);
        fs::write(&object, &self.bytes).with_context(|| format!("failed to write {}", object.display()))?;
        fs::write(&record, &self.record).with_context(|| format!("failed to write {}", record.display()))?;
        Ok(object)
    }

    /// Returns the versions of compiler, LLVM and linker, one per line.
    pub fn toolchain(&self) -> &str {
        self.record.splitn(3, '\n').nth(2).unwrap_or_default()
    }
}

fn paths(workspace: &Path) -> [PathBuf; 2] {
    ["imds-ebpf.o", "inputs.txt"].map(|file| workspace.join(PREBUILT).join(file))
}

/// Returns the first two lines of the record.
fn checksums(workspace: &Path, bytes: &[u8]) -> Result<String> {
    Ok(format!("sources {}\nobject {}\n", sources::sha256(workspace)?, sha256(bytes)))
}

fn sha256(bytes: &[u8]) -> String {
    format!("{:x}", Sha256::digest(bytes))
}

/// Returns one target directory for all profiles of the outer cargo, so that the object is built once. The target directory
/// of the outer cargo itself is locked while a build script runs.
fn shared_target_dir(out_dir: &Path) -> PathBuf {
    let outer = out_dir.ancestors().find(|dir| dir.join("CACHEDIR.TAG").is_file());
    outer.unwrap_or(out_dir).join("ebpf")
}
