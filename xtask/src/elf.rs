//! Dependencies of ELF files.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, bail};
use object::{
    build::elf::{Builder, Dynamic},
    elf::DT_NEEDED,
};

/// Returns the path of the dynamic linker and the libraries that an ELF file names, each library as a path below `/lib`. Empty for a
/// static program.
pub(crate) fn needs(path: &Path) -> Result<Vec<String>> {
    let bytes = fs::read(path).with_context(|| format!("failed to read {}", path.display()))?;
    let elf = Builder::read(&*bytes).with_context(|| format!("{} is not an ELF file", path.display()))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned();
    let mut needs = Vec::new();
    if elf.interp_section().is_some() {
        needs.push(text(elf.interp_data().context("the dynamic linker has no path")?));
    }
    for entry in elf.dynamic_data().unwrap_or_default().iter().filter(|entry| entry.tag() == DT_NEEDED) {
        let Dynamic::String { val, .. } = entry else { bail!("a library of {} has no name", path.display()) };
        needs.push(format!("/lib/{}", text(val.as_slice())));
    }
    Ok(needs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn needs_of_this_executable() {
        let needs = needs(&std::env::current_exe().unwrap()).unwrap();
        assert!(needs.iter().any(|path| path.contains("/ld-linux-")), "{needs:?}");
        assert!(needs.contains(&"/lib/libc.so.6".to_owned()), "{needs:?}");
    }
}
