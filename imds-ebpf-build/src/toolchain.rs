//! Commands that build and check the BPF object with a complete toolchain.

use std::{
    env,
    ffi::OsStr,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use crate::{Compiler, Host, NoToolchain, Survey};

/// Absolute path of Debian's compiler, because rustup's usually comes first on the PATH.
pub(crate) const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
pub(crate) const DEBIAN_CARGO: &str = "/usr/bin/cargo";
const DEBIAN_CLIPPY: &str = "/usr/bin/cargo-clippy";
pub(crate) const LINKER_VERSION: &str = "0.13.0";
const RUSTUP_TOOLCHAIN: &str = "RUSTUP_TOOLCHAIN";
/// Crates that need an unstable feature: inline assembly for BPF.
const UNSTABLE: &str = "aya_ebpf,imds_ebpf_common";
pub(crate) const TARGET: &str = "bpfel-unknown-none";
/// Name of the package, of its binary and of the built file.
pub(crate) const OBJECT: &str = "imds-ebpf";
/// Settings of cargo's profile, relative to the workspace.
const PROFILE: &str = "imds-ebpf/profile.toml";
/// Compiler flags. aya-ebpf needs the architecture for the registers of traced functions, which these programs do not read:
/// one object serves all architectures.
const FLAGS: [&str; 2] = ["-Clink-arg=--btf", "--cfg=bpf_target_arch=\"x86_64\""];

/// A compiler and a linker for the BPF object.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Toolchain {
    compiler: Compiler,
    linker: PathBuf,
}

impl Toolchain {
    /// Returns the first complete toolchain of this machine, or an error that lists the missing parts of each.
    pub fn detect() -> Result<Self, NoToolchain> {
        Survey::new(&Host::current()).toolchain()
    }

    pub(crate) const fn new(compiler: Compiler, linker: PathBuf) -> Self {
        Self { compiler, linker }
    }

    /// Returns the compiler of the toolchain.
    pub const fn compiler(&self) -> Compiler {
        self.compiler
    }

    /// Returns the path of bpf-linker.
    pub fn linker(&self) -> &Path {
        &self.linker
    }

    /// Returns the `cargo build` command for the BPF object of the workspace at `workspace`, with `target_dir` as target
    /// directory.
    pub fn build(&self, workspace: &Path, target_dir: &Path) -> Command {
        let program = match self.compiler {
            Compiler::Nightly => "cargo",
            Compiler::Debian => DEBIAN_CARGO,
        };
        self.cargo(program, "build", workspace, target_dir)
    }

    /// Returns the `cargo clippy` command for the BPF object, with warnings as errors. The arguments are those of
    /// [`Toolchain::build`].
    pub fn clippy(&self, workspace: &Path, target_dir: &Path) -> Command {
        // Runs cargo-clippy directly, because `cargo clippy` prefers the cargo-clippy in cargo's home, which is rustup's.
        let program = match self.compiler {
            Compiler::Nightly => "cargo-clippy",
            Compiler::Debian => DEBIAN_CLIPPY,
        };
        let mut clippy = self.cargo(program, "clippy", workspace, target_dir);
        clippy.args(["--", "--deny", "warnings"]);
        clippy
    }

    /// Returns the versions of the compiler, of its LLVM and of the linker, one line each.
    pub fn versions(&self) -> Result<String> {
        let mut rustc = match self.compiler {
            Compiler::Nightly => nightly(&Host::current(), "rustc"),
            Compiler::Debian => Command::new(DEBIAN_RUSTC),
        };
        let rustc = stdout(rustc.arg("-vV"))?;
        let compiler = rustc.lines().filter(|line| line.starts_with("rustc ") || line.starts_with("LLVM "));
        let linker = stdout(Command::new(&self.linker).arg("--version"))?;
        Ok(compiler.chain(linker.lines()).flat_map(|line| [line, "\n"]).collect())
    }

    fn cargo(&self, program: &str, subcommand: &str, workspace: &Path, target_dir: &Path) -> Command {
        let host = Host::current();
        let mut cargo = match self.compiler {
            Compiler::Nightly => nightly(&host, program),
            Compiler::Debian => Command::new(program),
        };
        leave_outer_cargo(&mut cargo);
        cargo.arg(subcommand);
        match self.compiler {
            Compiler::Nightly => cargo.arg("-Zbuild-std=core"),
            Compiler::Debian => {
                cargo.env("CARGO", DEBIAN_CARGO).env("RUSTC", DEBIAN_RUSTC).env("RUSTC_BOOTSTRAP", UNSTABLE)
            }
        };
        cargo.args(["--locked", "--release", "--config", PROFILE, "--package", OBJECT, "--target", TARGET]);
        cargo.arg("--target-dir").arg(target_dir).current_dir(workspace);
        let mut flags = FLAGS.map(str::to_owned).to_vec();
        // BTF contains source paths. Remapping makes the object independent of the build directory. `.` also lets the linker
        // find the source lines that it copies into BTF.
        flags.push(remap(workspace, "."));
        flags.extend(cargo_home().map(|home| remap(&home, "cargo")));
        cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
        if let Some(dir) = self.linker.parent() {
            cargo.env("PATH", host.path_after(dir));
        }
        cargo
    }
}

impl Compiler {
    /// Reports whether clippy is installed for this compiler.
    pub fn has_clippy(self, host: &Host) -> bool {
        match self {
            Self::Nightly => {
                let there = nightly(host, "cargo-clippy").arg("--version").output();
                there.is_ok_and(|output| output.status.success())
            }
            Self::Debian => host.file(DEBIAN_CLIPPY).is_file(),
        }
    }
}

/// Returns the compiler argument that replaces the path prefix `from` by `to` in its output.
pub fn remap(from: &Path, to: &str) -> String {
    format!("--remap-path-prefix={}={to}", from.display())
}

/// Returns cargo's home, which contains the sources of dependencies, or `None` if neither `CARGO_HOME` nor `HOME` is set.
pub fn cargo_home() -> Option<PathBuf> {
    let home = || Some(PathBuf::from(env::var_os("HOME")?).join(".cargo"));
    env::var_os("CARGO_HOME").map(PathBuf::from).or_else(home)
}

/// Returns the command that runs a program of rustup's nightly.
fn nightly(host: &Host, program: &str) -> Command {
    let mut rustup = Command::new(host.find("rustup").unwrap_or_else(|| "rustup".into()));
    leave_outer_cargo(&mut rustup);
    rustup.args(["run", "nightly", program]);
    rustup
}

/// Returns the standard output of a command.
fn stdout(command: &mut Command) -> Result<String> {
    let program = command.get_program().display().to_string();
    let output = command.output().with_context(|| format!("failed to start {program}"))?;
    ensure!(output.status.success(), "{program} failed ({})", output.status);
    String::from_utf8(output.stdout).with_context(|| format!("the output of {program} is not UTF-8"))
}

/// Returns the command that builds and installs a bpf-linker with Debian's LLVM of this major version. Replaces an
/// installed one.
pub fn linker_install(llvm: u32) -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    leave_outer_cargo(&mut cargo);
    // Selects the compiler of rust-toolchain.toml also outside the workspace.
    cargo.envs(env::var_os(RUSTUP_TOOLCHAIN).map(|toolchain| (RUSTUP_TOOLCHAIN, toolchain)));
    cargo.args(["install", "bpf-linker", "--version", LINKER_VERSION, "--locked", "--force"]);
    cargo.arg("--no-default-features").arg("--features").arg(format!("llvm-{llvm}"));
    cargo.env("LLVM_PREFIX", format!("/usr/lib/llvm-{llvm}"));
    cargo
}

/// Removes environment variables by which the outer cargo or its user configures the build of host code.
pub(crate) fn leave_outer_cargo(command: &mut Command) {
    for (name, _) in env::vars_os().filter(|(name, _)| is_for_the_host(name)) {
        command.env_remove(name);
    }
}

fn is_for_the_host(variable: &OsStr) -> bool {
    const NAMES: [&str; 4] = ["CARGO", "CARGO_ENCODED_RUSTFLAGS", "RUSTFLAGS", RUSTUP_TOOLCHAIN];
    const PREFIXES: [&str; 5] =
        ["CARGO_BUILD_", "CARGO_PROFILE_", "CARGO_TARGET_", "CARGO_UNSTABLE_", "RUSTC"];
    let variable = variable.to_string_lossy();
    NAMES.contains(&&*variable) || PREFIXES.iter().any(|prefix| variable.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_and_cargo_settings_are_separate() {
        for name in ["CARGO", "RUSTC", "RUSTC_WRAPPER", "CARGO_TARGET_DIR", "CARGO_PROFILE_RELEASE_LTO"] {
            assert!(is_for_the_host(OsStr::new(name)), "{name}");
        }
        for name in ["CARGO_HOME", "CARGO_NET_OFFLINE", "CARGO_MAKEFLAGS", "RUSTUP_HOME", "PATH"] {
            assert!(!is_for_the_host(OsStr::new(name)), "{name}");
        }
    }

    #[test]
    fn debian_compiler_has_full_path() {
        let toolchain = Toolchain::new(Compiler::Debian, PathBuf::from("/opt/a dir/bpf-linker"));
        let clippy = toolchain.clippy(Path::new("/w s"), Path::new("/t d"));
        assert_eq!(clippy.get_program(), DEBIAN_CLIPPY);
        assert_eq!(clippy.get_current_dir(), Some(Path::new("/w s")));
        let variable =
            |name| clippy.get_envs().find(|(key, _)| *key == name).and_then(|(_, value)| value).unwrap();
        assert_eq!(variable("RUSTC"), DEBIAN_RUSTC);
        assert_eq!(env::split_paths(variable("PATH")).next().as_deref(), Some(Path::new("/opt/a dir")));
    }

    #[test]
    fn nightly_builds_core_itself() {
        let toolchain = Toolchain::new(Compiler::Nightly, PathBuf::from("/bin/bpf-linker"));
        let build = toolchain.build(Path::new("/w"), Path::new("/t"));
        let arguments: Vec<_> = build.get_args().collect();
        assert_eq!(arguments[..5], ["run", "nightly", "cargo", "build", "-Zbuild-std=core"]);
        assert!(build.get_envs().all(|(name, _)| name != "RUSTC_BOOTSTRAP"));
    }
}
