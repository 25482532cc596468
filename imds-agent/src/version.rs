//! Version and build of this binary.

/// Version of the package, as in `Cargo.toml`.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Commit of the build, with the suffix `-dirty` if files had been changed, or `unknown` if the build did not know it.
pub const COMMIT: &str = env!("IMDS_COMMIT");
/// Output of `--version`: version, commit, and SHA-256 of the embedded BPF object.
pub const LONG: &str = concat!(
    env!("CARGO_PKG_VERSION"),
    "\ncommit ",
    env!("IMDS_COMMIT"),
    "\nbpf sha256 ",
    env!("IMDS_EBPF_SHA256")
);
