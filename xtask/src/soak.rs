//! The command `cargo xtask soak`.

use anyhow::Result;

use crate::{
    dist,
    setup::{self, Purpose},
    workspace::{cargo, ensure_root, execute},
};

/// Run the agent under load for an hour; needs root
///
/// Pods come, go and flood the metadata service, and configurations change. Checks that the agent's resource usage does
/// not grow, and that every packet is denied and accounted for.
#[derive(clap::Args)]
pub(crate) struct Soak {
    /// Duration in minutes; the first of two agents is killed after half of it
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u16).range(3..))]
    minutes: u16,
}

impl Soak {
    pub(crate) fn run(self) -> Result<()> {
        ensure_root("the soak test loads BPF programs and creates network namespaces: run it as root")?;
        setup::ensure(Purpose::Test)?;
        let agent = dist::shipped_agent()?;
        let mut soak = cargo("bench");
        soak.args(["--package", "imds-tests", "--bench", "soak", "--locked"]).env("IMDS_AGENT", agent);
        execute(soak.env("IMDS_SOAK_MINUTES", self.minutes.to_string()))
    }
}
