//! Provides the BPF object: the one in `imds-ebpf/prebuilt` if it matches the sources, otherwise one that is built from source.
//!
//! Build scripts call [`build`]. `cargo xtask ebpf` updates and checks the stored [`Object`].
//!
//! A build from source needs `core` for `bpfel-unknown-none` and a bpf-linker with an LLVM at least as new as the compiler's.
//! Two compilers provide `core`: rustup's nightly with rust-src builds it, and Debian's packages contain it precompiled.
//! [`Survey`] lists the installed parts of both, [`Toolchain`] is a complete one.

mod btf;
mod host;
mod llvm;
mod map_fields;
mod object;
mod prebuilt;
mod sources;
mod survey;
mod toolchain;

pub use host::Host;
pub use prebuilt::{Built, Object, build, compiles_programs};
pub use survey::{Compiler, DEBIAN_PACKAGES, Linker, MissingPart, NoToolchain, Survey};
pub use toolchain::{Toolchain, cargo_home, linker_install, remap};
