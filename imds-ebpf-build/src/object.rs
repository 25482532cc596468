//! The BPF object, for a build script.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    Toolchain, llvm,
    toolchain::{OBJECT, TARGET},
};

/// What the object is made of, for cargo to run the build script again.
const SOURCES: [&str; 5] =
    ["Cargo.lock", "Cargo.toml", "imds-ebpf", "imds-ebpf-common/Cargo.toml", "imds-ebpf-common/src"];

/// Builds the BPF object; for a build script, which it tells cargo when to run again. Returns the object's path.
pub fn build() -> Result<PathBuf> {
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
    fs::copy(&built, &object)
        .with_context(|| format!("could not copy {} to {}", built.display(), object.display()))?;
    Ok(object)
}

/// One directory for all profiles of the outer cargo, so that the object is built once. Not the outer cargo's own:
/// that one is locked while a build script runs.
fn shared_target_dir(out_dir: &Path) -> PathBuf {
    let outer = out_dir.ancestors().find(|dir| dir.join("CACHEDIR.TAG").is_file());
    outer.unwrap_or(out_dir).join("ebpf")
}
