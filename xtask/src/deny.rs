//! What is depended on.

use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result};

use crate::{
    setup::{self, Purpose},
    workspace::{cargo, execute, root, say},
};

/// Check licences, sources and versions of all crates that are depended on, and known vulnerabilities where their
/// database can be had; `deny.toml` says what is allowed
#[derive(clap::Args)]
pub(crate) struct Deny {
    /// Fail where the database can't be had
    #[arg(long)]
    advisories: bool,
}

impl Deny {
    pub(crate) fn run(self) -> Result<ExitCode> {
        setup::ensure(Purpose::Deny)?;
        execute(deny(&["check"]).args(["bans", "licenses", "sources"]))?;
        match execute(&mut deny(&["fetch", "db"])) {
            // It was just fetched.
            Ok(()) => execute(deny(&["--offline", "check"]).arg("advisories"))?,
            Err(error) if self.advisories => {
                return Err(error).context("RustSec's database can't be had");
            }
            Err(_) => say("advisories were NOT checked: RustSec's database can't be had"),
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn deny(arguments: &[&str]) -> Command {
    let mut deny = cargo("deny");
    deny.args(["--locked", "--log-level", "error"]).args(arguments).current_dir(root());
    deny
}
