//! The benchmarks.

use std::process::ExitCode;

use anyhow::{Result, bail};
use nix::unistd::Uid;

use crate::{
    setup::{self, Purpose},
    workspace::{cargo, execute},
};

/// Measure what the BPF programs cost a packet, against an empty program in the same run, and what the agent takes; needs
/// root
#[derive(clap::Args)]
pub(crate) struct Bench {
    /// Only this one: `test_run` for the programs, `footprint` for the agent
    name: Option<String>,
}

const ALL: [&str; 2] = ["test_run", "footprint"];

impl Bench {
    pub(crate) fn run(self) -> Result<ExitCode> {
        let names = match &self.name {
            Some(name) if !ALL.contains(&name.as_str()) => {
                bail!("there is no {name}, only {}", ALL.join(" and "))
            }
            Some(name) => vec![name.as_str()],
            None => ALL.to_vec(),
        };
        if !Uid::effective().is_root() {
            bail!("the benchmarks load BPF programs: run them as root");
        }
        setup::ensure(Purpose::Build)?;
        execute(cargo("build").args(["--release", "--package", "imds-agent", "--locked"]))?;
        for name in names {
            execute(cargo("bench").args(["--package", "imds-tests", "--bench", name, "--locked"]))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}
