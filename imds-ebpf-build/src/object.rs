//! Build of the BPF object from source.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, bail};
use object::{
    build::elf::{Builder, SectionData},
    elf::SHT_STRTAB,
};

use crate::{
    Toolchain, llvm, map_fields,
    toolchain::{OBJECT, TARGET},
};

/// Builds the object of the workspace and returns its content. `target_dir` is cargo's target directory for it.
pub(crate) fn compile(toolchain: &Toolchain, workspace: &Path, target_dir: &Path) -> Result<Vec<u8>> {
    let mut cargo = toolchain.build(workspace, target_dir);
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
    let built = target_dir.join(TARGET).join("release").join(OBJECT);
    let bytes = fs::read(&built).with_context(|| format!("failed to read {}", built.display()))?;
    rewrite(&bytes).with_context(|| format!("failed to rewrite {}", built.display()))
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
