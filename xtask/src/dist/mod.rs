//! Release artifacts: one static binary, and its SBOM, package, manual pages and completions.

mod image;
mod sbom;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};
use imds_ebpf_build::{cargo_home, remap};
use object::{build::elf::Builder, elf::DT_NEEDED};
use sha2::{Digest as _, Sha256};

use crate::{
    build,
    setup::{self, Purpose},
    workspace::{artifacts, cargo, execute, output_of, print_status, root},
};

pub(crate) use image::Image;

/// Maximum size of the binary in bytes.
const MAX_BINARY_LEN: u64 = 10 << 20;

/// Build the release artifacts in target/dist: the static binary, its .deb, SBOM, manual pages, completions and
/// checksums
#[derive(clap::Args)]
pub(crate) struct Dist {
    /// Build only the binary, its SBOM and checksums
    #[arg(long)]
    binary: bool,
    /// Build the binary a second time in another directory and compare; needs a tree without changes
    #[arg(long)]
    check: bool,
}

impl Dist {
    pub(crate) fn run(self) -> Result<()> {
        setup::ensure(if self.binary { Purpose::Build } else { Purpose::Dist })?;
        let dir = if self.binary { build_binary()? } else { build()? };
        if self.check {
            check(&dir)?;
        }
        let sums = write_checksums(&dir)?;
        print_status(format_args!("artifacts in {}:", dir.display()));
        eprint!("{sums}");
        Ok(())
    }
}

/// Builds all artifacts and returns their directory.
pub(crate) fn build() -> Result<PathBuf> {
    let dir = build_binary()?;
    manual(&dir)?;
    deb(&dir)?;
    Ok(dir)
}

/// Returns the directory of the artifacts.
pub(crate) fn dir() -> Result<PathBuf> {
    artifacts("dist")
}

/// Builds only the static binary and its SBOM, and returns their directory.
fn build_binary() -> Result<PathBuf> {
    let dir = dir()?;
    if dir.exists() {
        fs::remove_dir_all(&dir).with_context(|| format!("failed to remove {}", dir.display()))?;
    }
    fs::create_dir_all(&dir).with_context(|| format!("failed to create {}", dir.display()))?;
    let built = compile(root(), &artifacts("")?)?;
    let binary = dir.join("imds-agent");
    fs::copy(&built, &binary).with_context(|| format!("failed to copy {}", built.display()))?;
    check_binary(&binary)?;
    let sbom = sbom::agent_sbom(&triple()?, &sha256(&binary)?)?;
    let path = dir.join("imds-agent.cdx.json");
    fs::write(&path, sbom).with_context(|| format!("failed to write {}", path.display()))?;
    Ok(dir)
}

/// Returns the target triple of this machine. Naming the target explicitly keeps the flags of the binary, such as the
/// static C library, away from build scripts and macros.
fn triple() -> Result<String> {
    match env::consts::ARCH {
        arch @ ("x86_64" | "aarch64") => Ok(format!("{arch}-unknown-linux-gnu")),
        arch => bail!("imds-agent is not released for {arch}"),
    }
}

/// Builds the sources at `source` in `target_dir` and returns the binary, whose content depends on neither path.
fn compile(source: &Path, target_dir: &Path) -> Result<PathBuf> {
    let source = source.canonicalize().with_context(|| format!("failed to find {}", source.display()))?;
    let triple = triple()?;
    let mut flags = vec!["-Ctarget-feature=+crt-static".to_owned(), remap(&source, "imds-agent")];
    flags.push(remap(target_dir, "target"));
    flags.extend(cargo_home().map(|home| remap(&home, "cargo")));
    let mut build = cargo("build");
    build.args(["--locked", "--profile", "static", "--package", "imds-agent", "--target", &triple]);
    build.arg("--target-dir").arg(target_dir).current_dir(&source);
    build.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f")).env("IMDS_COMMIT", build::commit());
    execute(&mut build)?;
    Ok(target_dir.join(triple).join("static").join("imds-agent"))
}

/// Fails unless the binary is static and not too large.
fn check_binary(binary: &Path) -> Result<()> {
    let bytes = fs::read(binary).with_context(|| format!("failed to read {}", binary.display()))?;
    let elf = Builder::read(&*bytes).with_context(|| format!("{} is not an ELF file", binary.display()))?;
    let needed = elf.dynamic_data().unwrap_or_default().iter().any(|entry| entry.tag() == DT_NEEDED);
    ensure!(elf.interp_section().is_none() && !needed, "{} needs shared libraries", binary.display());
    ensure!(
        bytes.len() as u64 <= MAX_BINARY_LEN,
        "{} has {} bytes, at most {MAX_BINARY_LEN} are allowed",
        binary.display(),
        bytes.len()
    );
    Ok(())
}

/// Fails unless the committed sources give the same binary in other directories.
fn check(dir: &Path) -> Result<()> {
    ensure!(
        !build::commit().ends_with("-dirty"),
        "the comparison needs a clean tree: commit the changes first"
    );
    let again = dir.with_file_name("dist-again");
    let _ = fs::remove_dir_all(&again);
    let mut clone = Command::new("git");
    clone.args(["clone", "--quiet", "--no-hardlinks"]).arg(root()).arg(again.join("elsewhere"));
    execute(&mut clone)?;
    let second = compile(&again.join("elsewhere"), &again.join("built"))?;
    let (first, second) = (sha256(&dir.join("imds-agent"))?, sha256(&second)?);
    ensure!(first == second, "two builds differ: {first} and {second}");
    print_status(format_args!("two builds in different directories are identical: {first}"));
    let _ = fs::remove_dir_all(&again);
    Ok(())
}

/// Writes manual pages and completions, which the binary generates.
fn manual(dir: &Path) -> Result<()> {
    let binary = dir.join("imds-agent");
    execute(Command::new(&binary).arg("man").arg(dir.join("man")))?;
    let completions = dir.join("completions");
    fs::create_dir_all(&completions)?;
    for (shell, file) in [("bash", "imds-agent"), ("zsh", "_imds-agent"), ("fish", "imds-agent.fish")] {
        let script = output_of(Command::new(&binary).args(["completions", shell]))?;
        fs::write(completions.join(file), script)?;
    }
    Ok(())
}

/// Builds the Debian package, described in `imds-agent/Cargo.toml`, from the files in `dir`.
fn deb(dir: &Path) -> Result<()> {
    // The manifest refers to files in this directory.
    let expected = root().join("target/dist");
    ensure!(
        dir.canonicalize()? == expected.canonicalize().unwrap_or_default(),
        "the Debian package can only be built from {}: unset CARGO_TARGET_DIR",
        expected.display()
    );
    let mut deb = cargo("deb");
    deb.args(["--no-build", "--no-strip", "--locked", "--package", "imds-agent", "--deb-revision", "1"]);
    execute(deb.arg("--output").arg(dir).current_dir(root()))
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
