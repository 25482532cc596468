//! Formatting and clippy, for the host's crates and for the BPF one.

use std::{env, process::ExitCode};

use anyhow::Result;
use imds_ebpf_build::Toolchain;

use crate::{
    setup::{self, Purpose},
    workspace::{artifacts, cargo, execute, root},
};

/// Check the formatting and run clippy, on the BPF crate for its own target too; warnings are errors
#[derive(clap::Args)]
pub(crate) struct Lint {}

impl Lint {
    pub(crate) fn run(self) -> Result<ExitCode> {
        let Self {} = self;
        execute(cargo("fmt").args(["--all", "--check"]))?;

        setup::ensure(Purpose::Lint)?;
        execute(
            cargo("clippy")
                .args(["--workspace", "--exclude", "imds-ebpf", "--all-targets", "--locked"])
                .args(["--", "--deny", "warnings"]),
        )?;

        let target_dir = artifacts("ebpf-lint")?;
        execute(&mut Toolchain::detect()?.clippy(root(), &target_dir, env::consts::ARCH))?;
        Ok(ExitCode::SUCCESS)
    }
}
