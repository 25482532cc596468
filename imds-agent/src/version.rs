//! Which imds-agent this is.

/// Its version.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
/// The commit that it was built from, with `-dirty` behind it where files were changed since; `unknown` where its build did
/// not tell.
pub const COMMIT: &str = env!("IMDS_COMMIT");
/// What `--version` says: that, and the SHA-256 of the BPF object inside.
pub const LONG: &str = concat!(
    env!("CARGO_PKG_VERSION"),
    "\ncommit ",
    env!("IMDS_COMMIT"),
    "\nbpf sha256 ",
    env!("IMDS_EBPF_SHA256")
);
