//! The BPF object, for a build script.

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
    Toolchain, llvm,
    toolchain::{OBJECT, TARGET},
};

/// What the object is made of, for cargo to run the build script again.
const SOURCES: [&str; 5] =
    ["Cargo.lock", "Cargo.toml", "imds-ebpf", "imds-ebpf-common/Cargo.toml", "imds-ebpf-common/src"];

/// A BPF object that was built.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Object {
    /// Where it is.
    pub path: PathBuf,
    /// Its SHA-256, in hexadecimal.
    pub sha256: String,
}

/// Builds the BPF object; for a build script, which it tells cargo when to run again.
pub fn build() -> Result<Object> {
    let variable =
        |name| env::var_os(name).with_context(|| format!("{name} is not set: not in a build script?"));
    let manifest_dir = PathBuf::from(variable("CARGO_MANIFEST_DIR")?);
    let workspace = manifest_dir.parent().context("the crate has no parent directory")?;
    let out_dir = PathBuf::from(variable("OUT_DIR")?);
    let target_arch = env::var("CARGO_CFG_TARGET_ARCH").context("CARGO_CFG_TARGET_ARCH")?;

    let toolchain = Toolchain::detect()?;
    for path in
        SOURCES.map(|source| workspace.join(source)).iter().map(PathBuf::as_path).chain([toolchain.linker()])
    {
        println!("cargo::rerun-if-changed={}", path.display());
    }

    let target_dir = shared_target_dir(&out_dir);
    let mut cargo = toolchain.build(workspace, &target_dir, &target_arch);
    let output =
        cargo.output().with_context(|| format!("could not start {}", cargo.get_program().display()))?;
    if !output.status.success() {
        let compiler = toolchain.compiler();
        let stderr = String::from_utf8_lossy(&output.stderr);
        if llvm::is_too_old(&stderr) {
            bail!(
                "{} has an older LLVM than {compiler}: install a newer bpf-linker\n{stderr}",
                toolchain.linker().display()
            );
        }
        bail!("cargo could not build {OBJECT} with {compiler} ({}):\n{stderr}", output.status);
    }

    // The shared directory holds the object of the last build, which may have been for another kernel.
    let (built, object) = (target_dir.join(TARGET).join("release").join(OBJECT), out_dir.join(OBJECT));
    let bytes = fs::read(&built).with_context(|| format!("could not read {}", built.display()))?;
    let bytes =
        without_dwarf(&bytes).with_context(|| format!("could not strip {} of DWARF", built.display()))?;
    fs::write(&object, &bytes).with_context(|| format!("could not write {}", object.display()))?;
    Ok(Object { path: object, sha256: format!("{:x}", Sha256::digest(&bytes)) })
}

/// BTF was made of it, and the kernel knows no other debugging information: two thirds of the object.
fn without_dwarf(object: &[u8]) -> object::build::Result<Vec<u8>> {
    let mut object = Builder::read(object)?;
    for section in &mut object.sections {
        let name = section.name.strip_prefix(b".rel".as_slice()).unwrap_or(&section.name);
        section.delete = name.starts_with(b".debug_");
    }
    // LLVM has one table for names of sections and symbols, which `object` can read, but writes as two.
    let names = object.sections.add();
    (names.name, names.sh_type) = (b".shstrtab".as_slice().into(), SHT_STRTAB);
    names.data = SectionData::SectionString;
    let mut stripped = Vec::new();
    object.write(&mut stripped)?;
    Ok(stripped)
}

/// One directory for all profiles of the outer cargo, so that the object is built once. Not the outer cargo's own:
/// that one is locked while a build script runs.
fn shared_target_dir(out_dir: &Path) -> PathBuf {
    let outer = out_dir.ancestors().find(|dir| dir.join("CACHEDIR.TAG").is_file());
    outer.unwrap_or(out_dir).join("ebpf")
}
