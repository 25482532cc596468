//! The tests of all crates.

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Result, bail};
use nix::unistd::Uid;

use crate::{
    setup::{self, Purpose},
    workspace::{artifacts, cargo, execute},
};

/// Run the tests of all crates; needs root, changes nothing outside of namespaces that it makes
#[derive(clap::Args)]
pub(crate) struct Test {
    /// Names of tests, in whole or in part, and options of the test binaries such as --nocapture
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    filter: Vec<String>,
}

/// All crates but the BPF one, which no host can run.
pub(crate) const HOST_CRATES: [&str; 4] = ["--workspace", "--exclude", "imds-ebpf", "--locked"];

impl Test {
    pub(crate) fn run(self) -> Result<ExitCode> {
        let agent = prepare()?;
        let mut test = cargo("test");
        test.args(HOST_CRATES).arg("--no-fail-fast").arg("--").args(self.filter).env("IMDS_AGENT", agent);
        execute(&mut test)?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Builds what the tests take, and returns the agent that they try.
pub(crate) fn prepare() -> Result<PathBuf> {
    if !Uid::effective().is_root() {
        bail!(
            "the tests load BPF programs and make network namespaces: \
             run them as root, e.g. `sudo -E env \"PATH=$PATH\" cargo xtask test`"
        );
    }
    let agent = artifacts("debug")?.join("imds-agent");
    setup::ensure(Purpose::Test)?;
    // With all targets, so that cargo chooses the same features, and compiles nothing twice.
    execute(cargo("build").args(HOST_CRATES).arg("--all-targets"))?;
    Ok(agent)
}
