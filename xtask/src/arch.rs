//! Architectures of the machines on which the agent runs.

use std::{env, path::Path, process::Command};

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;

use crate::{
    setup::{self, Purpose},
    workspace::{execute, output_of, root},
};

/// An architecture, named as by Debian.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum Arch {
    Amd64,
    Arm64,
}

impl Arch {
    /// Returns the architecture of this machine.
    pub(crate) fn host() -> Result<Self> {
        match env::consts::ARCH {
            "x86_64" => Ok(Self::Amd64),
            "aarch64" => Ok(Self::Arm64),
            arch => bail!("imds-agent does not support the architecture {arch}"),
        }
    }

    /// Returns the architecture of Rust's target `triple`.
    pub(crate) fn from_triple(triple: &str) -> Result<Self> {
        let known = Self::value_variants().iter().find(|arch| arch.triple() == triple);
        let triples: Vec<_> = Self::value_variants().iter().map(|arch| arch.triple()).collect();
        known.copied().with_context(|| format!("the targets are {}", triples.join(" and ")))
    }

    /// Reports whether this machine runs programs of another architecture.
    pub(crate) fn is_foreign(self) -> bool {
        !Self::host().is_ok_and(|host| host == self)
    }

    /// Returns the kernel's name of the architecture.
    pub(crate) const fn machine(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64",
            Self::Arm64 => "aarch64",
        }
    }

    /// Returns Debian's name of the architecture.
    pub(crate) const fn debian(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
        }
    }

    /// Returns Rust's name of the target.
    pub(crate) fn triple(self) -> String {
        format!("{}-unknown-linux-gnu", self.machine())
    }

    /// Returns the path of a program that the cross toolchain has under a name of its own, such as `gcc` or `strip`.
    pub(crate) fn toolchain_program(self, program: &str) -> String {
        if self.is_foreign() { format!("{}-linux-gnu-{program}", self.machine()) } else { program.to_owned() }
    }

    /// Lets a cargo command compile for this architecture. Installs a missing cross compiler and standard library.
    pub(crate) fn set_target(self, cargo: &mut Command) -> Result<()> {
        let triple = self.triple();
        cargo.args(["--target", &triple]);
        if self.is_foreign() {
            setup::ensure(match self {
                Self::Amd64 => Purpose::CrossAmd64,
                Self::Arm64 => Purpose::CrossArm64,
            })?;
            ensure_standard_library(&triple)?;
            let variable = format!("CARGO_TARGET_{}_LINKER", triple.to_uppercase().replace('-', "_"));
            cargo.env(variable, self.toolchain_program("gcc"));
        }
        Ok(())
    }
}

/// Downloads the standard library for `triple` if the toolchain lacks it.
fn ensure_standard_library(triple: &str) -> Result<()> {
    let mut libdir = Command::new("rustc");
    libdir.args(["--print", "target-libdir", "--target", triple]).current_dir(root());
    if !Path::new(output_of(&mut libdir)?.trim()).exists() {
        let mut add = Command::new("rustup");
        execute(add.args(["target", "add", triple]).current_dir(root()))
            .with_context(|| format!("failed to get the standard library for {triple}"))?;
    }
    Ok(())
}
