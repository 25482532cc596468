//! Finds a toolchain that can build the BPF object, and builds it.
//!
//! The object needs `core` for `bpfel-unknown-none` and a bpf-linker with an LLVM at least as new as the compiler's.
//! Two toolchains have that: rustup's nightly with rust-src, which builds `core` itself, and Debian's packages, which
//! bring it precompiled.

use std::{
    env, fmt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

/// Where rustc of Debian's `rustc-web` is: never rustup's, which comes first on the PATH.
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
const DEBIAN_CARGO: &str = "/usr/bin/cargo";
const TARGET: &str = "bpfel-unknown-none";
/// The package, its binary, and the file that [`build`] leaves.
const OBJECT: &str = "imds-ebpf";

/// What the outer cargo sets for its own compiler, and the inner one must not inherit.
const OUTER_CARGO: [&str; 9] = [
    "CARGO",
    "CARGO_ENCODED_RUSTFLAGS",
    "CARGO_BUILD_TARGET",
    "CARGO_TARGET_DIR",
    "RUSTC",
    "RUSTC_WORKSPACE_WRAPPER",
    "RUSTC_WRAPPER",
    "RUSTFLAGS",
    "RUSTUP_TOOLCHAIN",
];

/// A toolchain that can build the BPF object.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Toolchain {
    /// rustup's nightly with rust-src.
    Nightly,
    /// Debian's `rustc-web`, `cargo-web` and `libstd-rust-web-dev-bpf`.
    Debian,
}

impl fmt::Display for Toolchain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nightly => "rustup's nightly with rust-src",
            Self::Debian => "Debian's rustc-web with its precompiled core",
        })
    }
}

impl Toolchain {
    /// The first toolchain that is there, or what is missing of each.
    pub fn detect() -> Result<Self> {
        let linker = find_linker();
        let (nightly, debian) = (missing_of_nightly(), missing_of_debian());
        match (linker, nightly, debian) {
            (true, None, _) => Ok(Self::Nightly),
            (true, Some(_), None) => Ok(Self::Debian),
            (linker, nightly, debian) => {
                let found = "found";
                bail!(
                    "no toolchain can build the BPF object: bpf-linker {}; rustup nightly {}; Debian packages {}. \
                     `cargo xtask setup` installs what is missing, or do one of: \
                     (1) rustup toolchain install nightly --component rust-src && cargo install bpf-linker; \
                     (2) apt-get install rustc-web cargo-web rust-web-llvm libstd-rust-web-dev-bpf llvm-22-dev && \
                     LLVM_PREFIX=/usr/lib/llvm-22 cargo install bpf-linker --version 0.13.0 --no-default-features \
                     --features llvm-22",
                    if linker { found } else { "is not on the PATH" },
                    nightly.unwrap_or(found),
                    debian.unwrap_or(found),
                )
            }
        }
    }

    /// `cargo SUBCOMMAND` of this toolchain for the BPF target, for the workspace at `workspace`, with object files in
    /// `target_dir`. The BPF code is told that it runs on a `target_arch` kernel.
    #[must_use]
    pub fn cargo(self, subcommand: &str, workspace: &Path, target_dir: &Path, target_arch: &str) -> Command {
        let mut cargo = match self {
            Self::Nightly => {
                let mut rustup = Command::new("rustup");
                rustup.args(["run", "nightly", "cargo"]);
                rustup
            }
            Self::Debian => Command::new(DEBIAN_CARGO),
        };
        for variable in OUTER_CARGO {
            cargo.env_remove(variable);
        }
        cargo.arg(subcommand).args(["--release", "--package", OBJECT, "--target", TARGET]);
        cargo.arg("--target-dir").arg(target_dir).current_dir(workspace);
        cargo.env(
            "CARGO_ENCODED_RUSTFLAGS",
            ["-Cdebuginfo=2", "-Clink-arg=--btf", &format!("--cfg=bpf_target_arch=\"{target_arch}\"")]
                .join("\x1f"),
        );
        match self {
            Self::Nightly => cargo.args(["-Z", "build-std=core"]),
            // aya-ebpf turns on one unstable feature, for inline assembly.
            Self::Debian => cargo.env("RUSTC", DEBIAN_RUSTC).env("RUSTC_BOOTSTRAP", "aya_ebpf"),
        };
        cargo
    }
}

/// Whether bpf-linker is on the PATH.
#[must_use]
pub fn find_linker() -> bool {
    env::var_os("PATH")
        .is_some_and(|path| env::split_paths(&path).any(|dir| dir.join("bpf-linker").is_file()))
}

/// Builds the BPF object; for a build script, which it tells cargo when to run again. Returns the object's path.
pub fn build() -> Result<PathBuf> {
    let variable =
        |name| env::var_os(name).with_context(|| format!("{name} is not set: not in a build script?"));
    let manifest_dir = PathBuf::from(variable("CARGO_MANIFEST_DIR")?);
    let workspace = manifest_dir.parent().context("the crate has no parent directory")?;
    let out_dir = PathBuf::from(variable("OUT_DIR")?);
    let target_arch = env::var("CARGO_CFG_TARGET_ARCH").context("CARGO_CFG_TARGET_ARCH")?;

    for path in
        ["Cargo.lock", "Cargo.toml", "imds-ebpf", "imds-ebpf-common/src", "imds-ebpf-common/Cargo.toml"]
    {
        println!("cargo::rerun-if-changed={}", workspace.join(path).display());
    }
    println!("cargo::rerun-if-env-changed=PATH");

    let target_dir = shared_target_dir(&out_dir);
    let mut cargo = Toolchain::detect()?.cargo("build", workspace, &target_dir, &target_arch);
    let output = cargo.output().with_context(|| format!("could not start {cargo:?}"))?;
    if !output.status.success() {
        bail!("{cargo:?} failed with {}:\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(target_dir.join(TARGET).join("release").join(OBJECT))
}

/// One directory for all profiles of the outer cargo, so that the object is built once. Not the outer cargo's own:
/// that one is locked while a build script runs.
fn shared_target_dir(out_dir: &Path) -> PathBuf {
    let outer = out_dir.ancestors().find(|dir| dir.join("CACHEDIR.TAG").is_file());
    outer.unwrap_or(out_dir).join("ebpf")
}

/// What the nightly way lacks, or `None` where it is complete.
fn missing_of_nightly() -> Option<&'static str> {
    let mut rustc = Command::new("rustup");
    for variable in OUTER_CARGO {
        rustc.env_remove(variable);
    }
    match rustc.args(["run", "nightly", "rustc", "--print", "sysroot"]).output() {
        Ok(output) if output.status.success() => {
            let sysroot = String::from_utf8_lossy(&output.stdout);
            let core = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core");
            (!core.is_dir()).then_some("lacks rust-src")
        }
        Ok(_) => Some("is not installed"),
        Err(_) => Some("cannot be had without rustup"),
    }
}

/// What the Debian way lacks, or `None` where it is complete.
fn missing_of_debian() -> Option<&'static str> {
    if !Path::new(DEBIAN_RUSTC).is_file() || !Path::new(DEBIAN_CARGO).is_file() {
        return Some("rustc-web and cargo-web are not installed");
    }
    let core = Path::new("/usr/lib/rustlib").join(TARGET).join("lib");
    (!core.is_dir()).then_some("libstd-rust-web-dev-bpf is not installed")
}
