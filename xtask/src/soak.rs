//! The long run.

use std::process::ExitCode;

use anyhow::{Result, bail};
use nix::unistd::Uid;

use crate::{
    setup::{self, Purpose},
    workspace::{cargo, execute},
};

/// Run the agent for an hour while pods come, go and flood and configurations change, and see that it takes no more at the
/// end than before, and that nothing arrives or is unaccounted for; needs root
#[derive(clap::Args)]
pub(crate) struct Soak {
    /// How long; half of it with one agent, which is killed, and half with the next
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u16).range(3..))]
    minutes: u16,
}

impl Soak {
    pub(crate) fn run(self) -> Result<ExitCode> {
        if !Uid::effective().is_root() {
            bail!("the soak loads BPF programs and makes network namespaces: run it as root");
        }
        setup::ensure(Purpose::Test)?;
        execute(cargo("build").args(["--release", "--package", "imds-agent", "--locked"]))?;
        let mut soak = cargo("bench");
        soak.args(["--package", "imds-tests", "--bench", "soak", "--locked"]);
        execute(soak.env("IMDS_SOAK_MINUTES", self.minutes.to_string()))?;
        Ok(ExitCode::SUCCESS)
    }
}
