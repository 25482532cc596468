//! Installed and missing parts of the toolchains.

use std::{
    fmt,
    path::{Path, PathBuf},
    process::Command,
};

use thiserror::Error;

use crate::{
    Host, Toolchain, llvm,
    toolchain::{DEBIAN_CARGO, DEBIAN_RUSTC, LINKER_VERSION, TARGET, leave_outer_cargo},
};

/// Debian packages of the compiler for the BPF object. Building bpf-linker also needs the `llvm-…-dev` of the compiler's
/// LLVM.
pub const DEBIAN_PACKAGES: [&str; 4] = ["rustc-web", "cargo-web", "rust-web-llvm", "libstd-rust-web-dev-bpf"];

/// A compiler that can build the BPF object.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Compiler {
    /// Nightly of rustup with rust-src.
    Nightly,
    /// Debian's packages `rustc-web`, `cargo-web` and `libstd-rust-web-dev-bpf`.
    Debian,
}

/// bpf-linker of this machine that starts.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Linker {
    /// Path of the program.
    pub path: PathBuf,
    /// Major version of its LLVM; `None` if unknown.
    pub llvm: Option<u32>,
}

/// Result of the search for the linker and both compilers. `Ok` of a compiler contains the major version of its LLVM, or
/// `None` if unknown.
#[derive(Debug)]
pub struct Survey {
    /// First bpf-linker that starts.
    pub linker: Result<Linker, MissingPart>,
    /// LLVM version of rustup's nightly.
    pub nightly: Result<Option<u32>, MissingPart>,
    /// LLVM version of Debian's compiler.
    pub debian: Result<Option<u32>, MissingPart>,
}

/// Reason why a part of a toolchain cannot be used.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
pub enum MissingPart {
    /// bpf-linker is not installed.
    #[error("is neither on the PATH nor in cargo's bin directory")]
    Linker,
    /// bpf-linker does not start, for example because its libLLVM was removed.
    #[error("at {} does not start", .0.display())]
    BrokenLinker(PathBuf),
    /// rustup is not installed.
    #[error("needs rustup, which is not installed")]
    Rustup,
    /// rustup has no nightly toolchain.
    #[error("is not installed")]
    Nightly,
    /// The nightly toolchain has no rust-src.
    #[error("lacks rust-src")]
    RustSrc,
    /// Debian's rustc or cargo is not installed.
    #[error("rustc-web and cargo-web are not installed")]
    DebianCompiler,
    /// Debian's precompiled `core` for the BPF target is not installed.
    #[error("libstd-rust-web-dev-bpf is not installed")]
    DebianCore,
    /// The compiler's LLVM is newer than the linker's, which cannot read its bitcode.
    #[error("has LLVM {compiler}, which bpf-linker's LLVM {linker} cannot read")]
    OlderLinker {
        /// Major version of the compiler's LLVM.
        compiler: u32,
        /// Major version of the linker's LLVM.
        linker: u32,
    },
}

/// Error for a machine without a complete toolchain: the missing parts of each.
#[derive(Debug, Error)]
#[error(
    "found no complete toolchain for the BPF object: bpf-linker {}; rustup's nightly {}; Debian's compiler: {}. \
     On Debian, `cargo xtask setup` as root installs the missing parts. Otherwise do one of: \
     (1) rustup toolchain install nightly --component rust-src, and put a bpf-linker of \
     https://github.com/aya-rs/bpf-linker/releases on the PATH; \
     (2) apt-get install {} llvm-22-dev && LLVM_PREFIX=/usr/lib/llvm-22 cargo install bpf-linker \
     --version {LINKER_VERSION} --no-default-features --features llvm-22",
    describe(linker.as_ref()),
    describe(nightly.as_ref()),
    describe(debian.as_ref()),
    DEBIAN_PACKAGES.join(" ")
)]
pub struct NoToolchain {
    linker: Option<MissingPart>,
    nightly: Option<MissingPart>,
    debian: Option<MissingPart>,
}

impl Survey {
    /// Searches `host` for all parts.
    pub fn new(host: &Host) -> Self {
        Self { linker: linker(host), nightly: nightly(host), debian: debian(host) }
    }

    /// Returns the first complete toolchain: nightly before Debian.
    pub fn toolchain(&self) -> Result<Toolchain, NoToolchain> {
        let usable = |compiler: &Result<Option<u32>, MissingPart>| {
            let llvm = compiler.clone()?;
            match (llvm, self.linker.as_ref().ok().and_then(|linker| linker.llvm)) {
                (Some(compiler), Some(linker)) if compiler > linker => {
                    Err(MissingPart::OlderLinker { compiler, linker })
                }
                _ => Ok(()),
            }
        };
        let (nightly, debian) = (usable(&self.nightly), usable(&self.debian));
        match (&self.linker, &nightly, &debian) {
            (Ok(linker), Ok(()), _) => Ok(Toolchain::new(Compiler::Nightly, linker.path.clone())),
            (Ok(linker), Err(_), Ok(())) => Ok(Toolchain::new(Compiler::Debian, linker.path.clone())),
            (Err(_), _, _) | (Ok(_), Err(_), Err(_)) => Err(NoToolchain {
                linker: self.linker.as_ref().err().cloned(),
                nightly: nightly.err(),
                debian: debian.err(),
            }),
        }
    }
}

/// Returns the first bpf-linker that starts.
fn linker(host: &Host) -> Result<Linker, MissingPart> {
    let mut broken = None;
    for path in host.find_all("bpf-linker") {
        if output(&path, &["--version"]).is_some() {
            let llvm = llvm::linked_version(&path).ok().flatten();
            return Ok(Linker { path, llvm });
        }
        broken.get_or_insert(path);
    }
    Err(broken.map_or(MissingPart::Linker, MissingPart::BrokenLinker))
}

fn nightly(host: &Host) -> Result<Option<u32>, MissingPart> {
    let rustup = host.find("rustup").ok_or(MissingPart::Rustup)?;
    let sysroot =
        output(&rustup, &["run", "nightly", "rustc", "--print", "sysroot"]).ok_or(MissingPart::Nightly)?;
    let sysroot = Path::new(sysroot.trim_end());
    if !sysroot.join("lib/rustlib/src/rust/library/core").is_dir() {
        return Err(MissingPart::RustSrc);
    }
    Ok(output(&sysroot.join("bin/rustc"), &["-vV"]).as_deref().and_then(llvm::rustc_version))
}

fn debian(host: &Host) -> Result<Option<u32>, MissingPart> {
    let rustc = host.file(DEBIAN_RUSTC);
    if !rustc.is_file() || !host.file(DEBIAN_CARGO).is_file() {
        return Err(MissingPart::DebianCompiler);
    }
    if !host.file("/usr/lib/rustlib").join(TARGET).join("lib").is_dir() {
        return Err(MissingPart::DebianCore);
    }
    Ok(output(&rustc, &["-vV"]).as_deref().and_then(llvm::rustc_version))
}

/// Returns the standard output of a program, or `None` if it does not start or fails.
fn output(program: &Path, arguments: &[&str]) -> Option<String> {
    let mut command = Command::new(program);
    leave_outer_cargo(&mut command);
    let output = command.args(arguments).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

fn describe(part: Option<&MissingPart>) -> String {
    part.map_or_else(|| "is installed".to_owned(), MissingPart::to_string)
}

impl fmt::Display for Compiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nightly => "rustup's nightly with rust-src",
            Self::Debian => "Debian's rustc-web with its precompiled core",
        })
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _};

    use super::*;

    fn survey(
        linker: Option<u32>,
        nightly: Result<Option<u32>, MissingPart>,
        debian: Result<Option<u32>, MissingPart>,
    ) -> Survey {
        Survey { linker: Ok(Linker { path: "/bin/bpf-linker".into(), llvm: linker }), nightly, debian }
    }

    fn chosen(survey: &Survey) -> Option<Compiler> {
        survey.toolchain().ok().map(|toolchain| toolchain.compiler())
    }

    #[test]
    fn nightly_preferred_if_linker_reads_it() {
        assert_eq!(chosen(&survey(Some(22), Ok(Some(22)), Ok(Some(22)))), Some(Compiler::Nightly));
        assert_eq!(chosen(&survey(Some(22), Ok(Some(23)), Ok(Some(22)))), Some(Compiler::Debian));
        assert_eq!(
            chosen(&survey(Some(22), Err(MissingPart::RustSrc), Ok(Some(22)))),
            Some(Compiler::Debian)
        );
        assert_eq!(chosen(&survey(Some(22), Ok(Some(23)), Ok(Some(23)))), None);
    }

    #[test]
    fn unknown_llvm_is_accepted() {
        assert_eq!(
            chosen(&survey(None, Ok(Some(23)), Err(MissingPart::DebianCore))),
            Some(Compiler::Nightly)
        );
        assert_eq!(
            chosen(&survey(Some(22), Ok(None), Err(MissingPart::DebianCore))),
            Some(Compiler::Nightly)
        );
    }

    #[test]
    fn error_names_missing_parts_and_remedies() {
        let linker = Err(MissingPart::Linker);
        let survey = Survey { linker, nightly: Err(MissingPart::RustSrc), debian: Ok(Some(22)) };
        let message = survey.toolchain().unwrap_err().to_string();
        assert!(!message.contains('\n'), "{message}");
        for part in [
            "bpf-linker is neither",
            "nightly lacks rust-src",
            "Debian's compiler: is installed",
            "(1) rustup",
            "(2) apt-get",
        ] {
            assert!(message.contains(part), "no {part:?} in {message}");
        }
    }

    /// One test for everything that starts a program: a script fails to start (ETXTBSY) while a process forked by another
    /// thread has it open for writing.
    #[test]
    fn installed_parts_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let root = &dir.path().join("a root with spaces");
        let host = &Host::below(root);
        let survey = Survey::new(host);
        assert_eq!(survey.linker, Err(MissingPart::Linker));
        assert_eq!(survey.nightly, Err(MissingPart::Rustup));
        assert_eq!(survey.debian, Err(MissingPart::DebianCompiler));

        script(&root.join("bin/bpf-linker"), "exit 1");
        script(&root.join("bin/rustup"), "exit 1");
        script(&host.file(DEBIAN_CARGO), "");
        script(&host.file(DEBIAN_RUSTC), "echo LLVM version: 22.1.8");
        let survey = Survey::new(host);
        assert_eq!(survey.linker, Err(MissingPart::BrokenLinker(root.join("bin/bpf-linker"))));
        assert_eq!(survey.nightly, Err(MissingPart::Nightly));
        assert_eq!(survey.debian, Err(MissingPart::DebianCore));

        let nightly = root.join("nightly");
        // Found after the broken one on the PATH.
        script(&root.join("usr/sbin/bpf-linker"), "# libLLVM.so.22.1");
        script(&root.join("bin/rustup"), &format!("echo '{}'", nightly.display()));
        fs::create_dir_all(host.file("/usr/lib/rustlib").join(TARGET).join("lib")).unwrap();
        let survey = Survey::new(host);
        assert_eq!(survey.linker, Ok(Linker { path: root.join("usr/sbin/bpf-linker"), llvm: Some(22) }));
        assert_eq!(survey.nightly, Err(MissingPart::RustSrc));
        assert_eq!(survey.debian, Ok(Some(22)));

        script(&nightly.join("bin/rustc"), "echo LLVM version: 23.1.0");
        fs::create_dir_all(nightly.join("lib/rustlib/src/rust/library/core")).unwrap();
        assert_eq!(Survey::new(host).nightly, Ok(Some(23)));
    }

    fn script(path: &Path, body: &str) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, format!("#!/bin/sh\n{body}\n")).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
}
