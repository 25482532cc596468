//! The command `cargo xtask deny`.

use std::process::Command;

use anyhow::{Context as _, Result};

use crate::{
    setup::{self, Purpose},
    workspace::{cargo, execute, print_status, root},
};

/// Check licences, sources and versions of all dependencies, and known vulnerabilities if the database is available;
/// `deny.toml` has the rules
#[derive(clap::Args)]
pub(crate) struct Deny {
    /// Fail if the advisory database is not available
    #[arg(long)]
    advisories: bool,
}

impl Deny {
    pub(crate) fn run(self) -> Result<()> {
        setup::ensure(Purpose::Deny)?;
        execute(deny(&["check"]).args(["bans", "licenses", "sources"]))?;
        match execute(&mut deny(&["fetch", "db"])) {
            // Offline, because the database was just fetched.
            Ok(()) => execute(deny(&["--offline", "check"]).arg("advisories"))?,
            Err(error) if self.advisories => {
                return Err(error).context("failed to fetch the RustSec database");
            }
            Err(_) => print_status("advisories were NOT checked: failed to fetch the RustSec database"),
        }
        Ok(())
    }
}

fn deny(arguments: &[&str]) -> Command {
    let mut deny = cargo("deny");
    deny.args(["--locked", "--log-level", "error"]).args(arguments).current_dir(root());
    deny
}
