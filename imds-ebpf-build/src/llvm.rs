//! LLVM versions of compilers and linkers.
//!
//! LLVM reads only bitcode of its own version and of older ones.

use std::{
    fs::File,
    io::{self, Read as _},
    path::Path,
};

/// Number of bytes to search: the names of shared libraries are at the beginning of an executable.
const HEAD: u64 = 1 << 20;

/// Returns the major version of LLVM in the output of `rustc -vV`.
pub(crate) fn rustc_version(version: &str) -> Option<u32> {
    version.lines().find_map(|line| leading_number(line.strip_prefix("LLVM version: ")?.as_bytes()))
}

/// Returns the major version of the libLLVM that an executable loads, or `None` if LLVM is linked statically.
pub(crate) fn linked_version(path: &Path) -> io::Result<Option<u32>> {
    let mut head = Vec::new();
    File::open(path)?.take(HEAD).read_to_end(&mut head)?;
    Ok(library_version(&head))
}

/// Reports whether the output of bpf-linker contains the error about bitcode of a newer LLVM.
pub(crate) fn is_too_old(linker_output: &str) -> bool {
    linker_output.contains("Reader: 'LLVM")
}

/// Returns the major version in a library name such as `libLLVM.so.22.1` or `libLLVM-22.so`.
fn library_version(bytes: &[u8]) -> Option<u32> {
    const NAME: &[u8] = b"libLLVM";
    bytes.windows(NAME.len()).enumerate().filter(|(_, window)| *window == NAME).find_map(|(at, _)| {
        let rest = &bytes[at + NAME.len()..];
        leading_number(rest.strip_prefix(b".so.").or_else(|| rest.strip_prefix(b"-"))?)
    })
}

fn leading_number(bytes: &[u8]) -> Option<u32> {
    let digits = bytes.iter().take_while(|byte| byte.is_ascii_digit()).count();
    str::from_utf8(&bytes[..digits]).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rustc_llvm_version() {
        assert_eq!(rustc_version("rustc 1.96.0\nhost: x\nLLVM version: 22.1.8\n"), Some(22));
        assert_eq!(rustc_version("rustc 1.96.0\nLLVM version: unknown\n"), None);
        assert_eq!(rustc_version(""), None);
    }

    #[test]
    fn library_name_has_major_version() {
        assert_eq!(library_version(b"\0libc.so.6\0libLLVM.so.22.1\0"), Some(22));
        assert_eq!(library_version(b"\0libLLVM-19.so\0"), Some(19));
        assert_eq!(library_version(b"libLLVMCore libLLVM.so.23"), Some(23));
        assert_eq!(library_version(b"libLLVM.so.\0libLLVM"), None);
        assert_eq!(library_version(b""), None);
    }

    #[test]
    fn linker_rejects_newer_bitcode() {
        let complaint =
            "ERROR llvm: Invalid record (Producer: 'LLVM23.0.0-rust-1.99.0-nightly' Reader: 'LLVM 22.1.2')";
        assert!(is_too_old(complaint));
        assert!(!is_too_old("ERROR llvm: Expected a single module"));
    }
}
