//! Finds a toolchain that can build the BPF object, and builds it.
//!
//! The object needs `core` for `bpfel-unknown-none` and a bpf-linker with an LLVM at least as new as the compiler's.
//! Two compilers have that: rustup's nightly with rust-src, which builds `core` itself, and Debian's packages, which
//! bring it precompiled. [`Survey`] says what of both is there, [`Toolchain`] is one that is complete, and [`build`]
//! is what a build script calls.

mod host;
mod llvm;
mod object;
mod survey;
mod toolchain;

pub use host::Host;
pub use object::{Object, build};
pub use survey::{Compiler, DEBIAN_PACKAGES, Lack, Linker, NoToolchain, Survey};
pub use toolchain::{Toolchain, cargo_home, linker_install, remap};
