//! The command `cargo xtask lint`.

use std::process::Command;

use anyhow::Result;
use imds_ebpf_build::Toolchain;

use crate::{
    setup::{self, Purpose},
    workspace::{artifacts, cargo, execute, root},
};

pub(crate) fn run() -> Result<()> {
    execute(cargo("fmt").args(["--all", "--check"]))?;

    setup::ensure(Purpose::Lint)?;
    execute(Command::new("python3").arg("xtask/prose.py").current_dir(root()))?;
    execute(
        cargo("clippy")
            .args(["--workspace", "--exclude", "imds-ebpf", "--all-targets", "--locked"])
            .args(["--", "--deny", "warnings"]),
    )?;

    let target_dir = artifacts("ebpf-lint")?;
    execute(&mut Toolchain::detect()?.clippy(root(), &target_dir))
}
