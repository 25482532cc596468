//! The benchmarks.

use std::process::ExitCode;

use anyhow::{Result, bail};
use nix::unistd::Uid;

use crate::{
    setup::{self, Purpose},
    workspace::{cargo, execute},
};

/// Measure what the BPF programs cost a packet, against an empty program in the same run; needs root
#[derive(clap::Args)]
pub(crate) struct Bench {}

impl Bench {
    pub(crate) fn run(self) -> Result<ExitCode> {
        let Self {} = self;
        if !Uid::effective().is_root() {
            bail!("the benchmarks load BPF programs: run them as root");
        }
        setup::ensure(Purpose::Build)?;
        execute(cargo("bench").args(["--package", "imds-tests", "--bench", "test_run", "--locked"]))?;
        Ok(ExitCode::SUCCESS)
    }
}
