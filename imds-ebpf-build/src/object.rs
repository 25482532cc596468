//! Build of the BPF object, for build scripts.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use object::{
    build::elf::{Builder, SectionData},
    elf::SHT_STRTAB,
};
use sha2::{Digest as _, Sha256};

use crate::{
    Toolchain, llvm, map_fields,
    toolchain::{OBJECT, TARGET},
};

/// Inputs of the object, relative to the workspace. Cargo runs the build script again if one of them changes.
const SOURCES: [&str; 5] =
    ["Cargo.lock", "Cargo.toml", "imds-ebpf", "imds-ebpf-common/Cargo.toml", "imds-ebpf-common/src"];

/// BPF object that [`build`] has written.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Object {
    /// Path of the file, in `OUT_DIR`.
    pub path: PathBuf,
    /// SHA-256 of the file, in hexadecimal.
    pub sha256: String,
}

/// Builds the BPF object. Call it from a build script: it prints `cargo::rerun-if-changed` for all inputs.
pub fn build() -> Result<Object> {
    let variable = |name| env::var_os(name).with_context(|| format!("{name} is not set: build scripts only"));
    let manifest_dir = PathBuf::from(variable("CARGO_MANIFEST_DIR")?);
    let workspace = manifest_dir.parent().context("the crate has no parent directory")?;
    let out_dir = PathBuf::from(variable("OUT_DIR")?);
    let target_arch = env::var("CARGO_CFG_TARGET_ARCH").context("failed to read CARGO_CFG_TARGET_ARCH")?;

    let toolchain = Toolchain::detect()?;
    for path in
        SOURCES.map(|source| workspace.join(source)).iter().map(PathBuf::as_path).chain([toolchain.linker()])
    {
        println!("cargo::rerun-if-changed={}", path.display());
    }

    let target_dir = shared_target_dir(&out_dir);
    let mut cargo = toolchain.build(workspace, &target_dir, &target_arch);
    let output =
        cargo.output().with_context(|| format!("failed to start {}", cargo.get_program().display()))?;
    if !output.status.success() {
        let compiler = toolchain.compiler();
        let stderr = String::from_utf8_lossy(&output.stderr);
        if llvm::is_too_old(&stderr) {
            bail!(
                "{} has an older LLVM than {compiler}: install a newer bpf-linker\n{stderr}",
                toolchain.linker().display()
            );
        }
        bail!("failed to build {OBJECT} with {compiler} ({}):\n{stderr}", output.status);
    }

    // The next build, possibly for another architecture, overwrites the object in the shared directory.
    let (built, object) = (target_dir.join(TARGET).join("release").join(OBJECT), out_dir.join(OBJECT));
    let bytes = fs::read(&built).with_context(|| format!("failed to read {}", built.display()))?;
    let bytes = rewrite(&bytes).with_context(|| format!("failed to rewrite {}", built.display()))?;
    fs::write(&object, &bytes).with_context(|| format!("failed to write {}", object.display()))?;
    Ok(Object { path: object, sha256: format!("{:x}", Sha256::digest(&bytes)) })
}

/// Removes the DWARF sections, two thirds of the object: the kernel reads only BTF, which the linker has generated from DWARF.
/// Gives the fields of the maps their types in BTF.
fn rewrite(object: &[u8]) -> Result<Vec<u8>> {
    let mut object = Builder::read(object)?;
    for section in &mut object.sections {
        let name = section.name.strip_prefix(b".rel".as_slice()).unwrap_or(&section.name);
        section.delete = name.starts_with(b".debug_");
        if section.name.as_slice() == b".BTF" {
            let SectionData::Data(btf) = &section.data else { bail!("section .BTF has no data") };
            section.data = SectionData::Data(map_fields::retype(btf).context("section .BTF")?.into());
        }
    }
    // LLVM writes one string table for the names of sections and symbols. `object` can read that, but writes two tables.
    let names = object.sections.add();
    (names.name, names.sh_type) = (b".shstrtab".as_slice().into(), SHT_STRTAB);
    names.data = SectionData::SectionString;
    let mut stripped = Vec::new();
    object.write(&mut stripped)?;
    Ok(stripped)
}

/// Returns one target directory for all profiles of the outer cargo, so that the object is built once. The target directory
/// of the outer cargo itself is locked while a build script runs.
fn shared_target_dir(out_dir: &Path) -> PathBuf {
    let outer = out_dir.ancestors().find(|dir| dir.join("CACHEDIR.TAG").is_file());
    outer.unwrap_or(out_dir).join("ebpf")
}
