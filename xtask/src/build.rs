//! The agent's binary.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;

use crate::{
    setup::{self, Purpose},
    workspace::{artifacts, cargo, execute, say},
};

/// Build the agent: one binary with the BPF programs inside, in target/release
#[derive(clap::Args)]
pub(crate) struct Build {}

impl Build {
    pub(crate) fn run(self) -> Result<ExitCode> {
        let Self {} = self;
        say(format_args!("the agent is {}", release()?.display()));
        Ok(ExitCode::SUCCESS)
    }
}

/// Builds the agent for use, and returns where it is.
pub(crate) fn release() -> Result<PathBuf> {
    let agent = artifacts("release")?.join("imds-agent");
    setup::ensure(Purpose::Build)?;
    execute(cargo("build").args(["--release", "--package", "imds-agent"]))?;
    Ok(agent)
}
