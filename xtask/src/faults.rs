//! The fault suite.

use std::process::ExitCode;

use anyhow::Result;

use crate::{
    test::{self, HOST_CRATES},
    workspace::{cargo, execute},
};

/// Run the tests that break things while pods send, and tell in numbers what each did; needs root, takes some minutes
#[derive(clap::Args)]
pub(crate) struct Faults {
    /// Names of tests, in whole or in part, and options of the test binary such as --nocapture
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    filter: Vec<String>,
}

impl Faults {
    pub(crate) fn run(self) -> Result<ExitCode> {
        let agent = test::prepare()?;
        let mut test = cargo("test");
        test.args(HOST_CRATES).args(["--test", "faults", "--", "--include-ignored", "--show-output"]);
        // Each has the machine for itself.
        test.arg("--test-threads=1").args(self.filter).env("IMDS_AGENT", agent);
        execute(&mut test)?;
        Ok(ExitCode::SUCCESS)
    }
}
