//! Release artifacts: the static binaries of the agent and its broker, and their SBOM, packages, manual pages and completions.

mod chart;
mod contents;
mod image;
mod oci;
mod plugin;
mod provenance;
mod release;
mod rpm;
mod sbom;
mod tarball;
#[cfg(test)]
mod tests;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use imds_ebpf_build::{cargo_home, remap};
use sha2::{Digest as _, Sha256};

use crate::{
    arch::Arch,
    build, elf,
    setup::{self, Purpose},
    workspace::{artifacts, cargo, execute, output_of, print_status, root},
};

pub(crate) use chart::Chart;
use contents::Contents;
pub(crate) use image::Image;
pub(crate) use release::Release;

/// Version of the artifacts, which all crates have.
const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Maximum size of the binary in bytes.
const MAX_BINARY_LEN: u64 = 10 << 20;
/// Package and binary of the agent.
const AGENT: &str = "imds-agent";
/// Package and binary of the broker, which is beside the agent in all packages.
const BROKER: &str = "imds-broker";
/// File name of the SBOM.
const SBOM: &str = "imds-agent.cdx.json";

/// Build the artifacts of one architecture: the static binary, its .deb, .rpm, tarball, SBOM, kubectl plugin and checksums in
/// target/dist/ARCHITECTURE, manual pages and completions in target/dist
#[derive(clap::Args)]
pub(crate) struct Dist {
    /// Build only the binary, its SBOM and checksums
    #[arg(long)]
    binary: bool,
    /// Target of the binary, such as aarch64-unknown-linux-gnu [default: this machine's]
    #[arg(long, value_name = "TRIPLE", value_parser = Arch::from_triple)]
    target: Option<Arch>,
    /// Build the binary a second time in another directory and compare; needs a tree without changes
    #[arg(long)]
    check: bool,
}

impl Dist {
    pub(crate) fn run(self) -> Result<()> {
        setup::ensure(if self.binary { Purpose::Build } else { Purpose::Dist })?;
        let arch = self.target.map_or_else(Arch::host, Ok)?;
        if self.binary {
            build_binaries(&[arch])?;
        } else {
            build_all(&[arch])?;
        }
        let dir = dir(arch)?;
        if self.check {
            check(arch, &dir)?;
        }
        let sums = write_checksums(&dir)?;
        print_status(format_args!("artifacts in {}:", dir.display()));
        eprint!("{sums}");
        Ok(())
    }
}

/// Builds all artifacts of an architecture and returns their directory.
pub(crate) fn build(arch: Arch) -> Result<PathBuf> {
    build_all(&[arch])?;
    dir(arch)
}

/// Builds all artifacts of `arches`.
fn build_all(arches: &[Arch]) -> Result<()> {
    build_binaries(arches)?;
    build_plugin(arches)?;
    let host = arches.iter().find(|arch| !arch.is_foreign());
    let agent = host.map_or_else(build::debug, |&host| Ok(dir(host)?.join("imds-agent")))?;
    let dist = artifacts("dist")?;
    manual(&agent, &dist)?;
    for &arch in arches {
        let dir = dir(arch)?;
        deb(arch, &dir)?;
        let contents = Contents::read(&dir, &dist)?;
        tarball::write(arch, &contents, &dir)?;
        rpm::write(arch, VERSION, &contents, &dir)?;
    }
    Ok(())
}

/// Returns the directory of the artifacts.
pub(crate) fn dir(arch: Arch) -> Result<PathBuf> {
    Ok(artifacts("dist")?.join(arch.debian()))
}

/// Builds the agent and its broker for this machine as `cargo xtask dist` ships them. Returns the path of the agent.
pub(crate) fn shipped_agent() -> Result<PathBuf> {
    let (arch, target_dir) = (Arch::host()?, artifacts("")?);
    for package in [AGENT, BROKER] {
        compile(package, &[arch], root(), &target_dir)?;
    }
    Ok(built(AGENT, arch, &target_dir))
}

/// Builds only the static binaries and their SBOMs.
fn build_binaries(arches: &[Arch]) -> Result<()> {
    let target_dir = artifacts("")?;
    compile(AGENT, arches, root(), &target_dir)?;
    // A cargo command of its own: together with the agent, cargo would select the features of both for each.
    compile(BROKER, arches, root(), &target_dir)?;
    for &arch in arches {
        let (dir, built) = (dir(arch)?, built(AGENT, arch, &target_dir));
        if dir.exists() {
            fs::remove_dir_all(&dir).with_context(|| format!("failed to remove {}", dir.display()))?;
        }
        fs::create_dir_all(&dir).with_context(|| format!("failed to create {}", dir.display()))?;
        let binary = dir.join("imds-agent");
        fs::copy(&built, &binary).with_context(|| format!("failed to copy {}", built.display()))?;
        check_binary(&binary)?;
        let broker = dir.join(BROKER);
        fs::copy(self::built(BROKER, arch, &target_dir), &broker)
            .with_context(|| format!("failed to copy {BROKER} to {}", broker.display()))?;
        check_binary(&broker)?;
        let sbom = sbom::agent_sbom(&arch.triple(), &sha256(&binary)?)?;
        for path in [dir.join(SBOM), built.with_file_name(SBOM)] {
            fs::write(&path, &sbom).with_context(|| format!("failed to write {}", path.display()))?;
        }
    }
    Ok(())
}

/// Builds the tarballs of the kubectl plugin.
fn build_plugin(arches: &[Arch]) -> Result<()> {
    let target_dir = artifacts("")?;
    // A cargo command of its own: together with the agent, cargo would select the plugin's features for both.
    compile(plugin::PLUGIN, arches, root(), &target_dir)?;
    for &arch in arches {
        let binary = built(plugin::PLUGIN, arch, &target_dir);
        check_binary(&binary)?;
        plugin::write(arch, &binary, &dir(arch)?)?;
    }
    Ok(())
}

/// Builds a package from the sources at `source` in `target_dir`. The content of the binaries depends on neither path. Naming the target
/// explicitly keeps the flags of the binary, such as the static C library, away from build scripts and macros. Linking takes
/// most of the time and one processor, so that one cargo command builds two architectures in half of the time.
fn compile(package: &str, arches: &[Arch], source: &Path, target_dir: &Path) -> Result<()> {
    let source = source.canonicalize().with_context(|| format!("failed to find {}", source.display()))?;
    let mut flags = vec!["-Ctarget-feature=+crt-static".to_owned(), remap(&source, "imds-agent")];
    flags.push(remap(target_dir, "target"));
    // Saves 0.4 MB in a position-independent binary. glibc 2.36 or newer applies these relocations at the start.
    flags.push("-Clink-arg=-Wl,-z,pack-relative-relocs".to_owned());
    flags.extend(cargo_home().map(|home| remap(&home, "cargo")));
    let mut build = cargo("build");
    build
        .args(["--locked", "--profile", build::SHIPPED_PROFILE, "--package", package, "--target-dir"])
        .arg(target_dir);
    build.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f")).env("IMDS_COMMIT", build::commit());
    for arch in arches {
        arch.set_target(&mut build)?;
    }
    execute(build.current_dir(&source))
}

/// Returns the path at which [`compile`] leaves the binary of a package.
fn built(package: &str, arch: Arch, target_dir: &Path) -> PathBuf {
    target_dir.join(arch.triple()).join(build::SHIPPED_PROFILE).join(package)
}

/// Fails unless the binary is static and not too large.
fn check_binary(binary: &Path) -> Result<()> {
    ensure!(elf::needs(binary)?.is_empty(), "{} needs shared libraries", binary.display());
    let length = fs::metadata(binary).with_context(|| format!("failed to read {}", binary.display()))?.len();
    ensure!(
        length <= MAX_BINARY_LEN,
        "{} has {length} bytes, at most {MAX_BINARY_LEN} are allowed",
        binary.display()
    );
    Ok(())
}

/// Fails unless the committed sources give the same binary in other directories.
fn check(arch: Arch, dir: &Path) -> Result<()> {
    ensure!(
        !build::commit().ends_with("-dirty"),
        "the comparison needs a clean tree: commit the changes first"
    );
    let again = artifacts("dist-again")?;
    let _ = fs::remove_dir_all(&again);
    let mut clone = Command::new("git");
    clone.args(["clone", "--quiet", "--no-hardlinks"]).arg(root()).arg(again.join("elsewhere"));
    execute(&mut clone)?;
    compile(AGENT, &[arch], &again.join("elsewhere"), &again.join("built"))?;
    let second = built(AGENT, arch, &again.join("built"));
    let (first, second) = (sha256(&dir.join("imds-agent"))?, sha256(&second)?);
    ensure!(first == second, "two builds differ: {first} and {second}");
    print_status(format_args!("two builds in different directories are identical: {first}"));
    let _ = fs::remove_dir_all(&again);
    Ok(())
}

/// Writes manual pages and completions, which an agent of any architecture generates.
fn manual(agent: &Path, dir: &Path) -> Result<()> {
    execute(Command::new(agent).arg("man").arg(dir.join("man")))?;
    let completions = dir.join("completions");
    fs::create_dir_all(&completions)?;
    for (shell, file) in [("bash", "imds-agent"), ("zsh", "_imds-agent"), ("fish", "imds-agent.fish")] {
        let script = output_of(Command::new(agent).args(["completions", shell]))?;
        fs::write(completions.join(file), script)?;
    }
    Ok(())
}

/// Builds the Debian package in `dir`. `imds-agent/Cargo.toml` describes it, and refers to the manual pages and completions.
fn deb(arch: Arch, dir: &Path) -> Result<()> {
    let expected = root().join("target/dist").join(arch.debian());
    ensure!(
        dir.canonicalize()? == expected.canonicalize().unwrap_or_default(),
        "the Debian package can only be built from {}: unset CARGO_TARGET_DIR",
        expected.display()
    );
    execute(&mut cargo_deb(arch, dir)?)
}

fn cargo_deb(arch: Arch, dir: &Path) -> Result<Command> {
    let mut deb = cargo("deb");
    deb.args(["--no-build", "--no-strip", "--locked", "--package", "imds-agent", "--deb-revision", "1"]);
    deb.args(["--profile", build::SHIPPED_PROFILE, "--target", &arch.triple(), "--output"]);
    deb.arg(dir.join(deb_name(arch)));
    // Otherwise cargo-deb takes the time at which Cargo.toml was checked out.
    deb.env("SOURCE_DATE_EPOCH", build::time()?.to_string());
    deb.current_dir(root());
    Ok(deb)
}

/// Returns the file name of the Debian package. The name that cargo-deb chooses has `~` in the version of a pre-release, which
/// release servers replace.
fn deb_name(arch: Arch) -> String {
    format!("imds-agent_{VERSION}-1_{}.deb", arch.debian())
}

/// Returns the artifact of the agent with this suffix.
pub(crate) fn artifact(dir: &Path, suffix: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(dir).with_context(|| format!("failed to list {}", dir.display()))?;
    let is_artifact = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("imds-agent") && name.ends_with(suffix)
    };
    let found = entries.flatten().map(|entry| entry.path()).find(is_artifact);
    found.with_context(|| format!("no imds-agent*{suffix} in {}: run without --no-build", dir.display()))
}

/// Writes the checksums of every file of `dir` in the format of sha256sum(1), and returns them.
fn write_checksums(dir: &Path) -> Result<String> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    names.sort();
    let lines = names.iter().map(|name| Ok(format!("{}  {name}\n", sha256(&dir.join(name))?)));
    let sums = lines.collect::<Result<String>>()?;
    fs::write(dir.join("SHA256SUMS"), &sums)?;
    Ok(sums)
}

fn sha256(path: &Path) -> Result<String> {
    let bytes = fs::read(path).with_context(|| format!("failed to read {}", path.display()))?;
    Ok(format!("{:x}", Sha256::digest(bytes)))
}
