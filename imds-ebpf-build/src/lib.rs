//! Finds a toolchain that can build the BPF object, and builds it.
//!
//! The object needs `core` for `bpfel-unknown-none` and a bpf-linker with an LLVM at least as new as the compiler's.
//! Two compilers provide `core`: rustup's nightly with rust-src builds it, and Debian's packages contain it precompiled.
//! [`Survey`] lists the installed parts of both, [`Toolchain`] is a complete one, and build scripts call [`build`].

mod btf;
mod host;
mod llvm;
mod map_fields;
mod object;
mod survey;
mod toolchain;

pub use host::Host;
pub use object::{Object, build};
pub use survey::{Compiler, DEBIAN_PACKAGES, Lack, Linker, NoToolchain, Survey};
pub use toolchain::{Toolchain, cargo_home, linker_install, remap};
