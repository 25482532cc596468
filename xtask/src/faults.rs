//! The command `cargo xtask faults`.

use std::{path::PathBuf, process::Command};

use anyhow::Result;

use crate::{
    test::{self, HOST_CRATES},
    workspace::{artifacts, cargo, execute, root},
};

/// Run the tests that inject faults while pods send, and print numbers of each; needs root, takes some minutes
#[derive(clap::Args)]
pub(crate) struct Faults {
    /// Alternate with the agent of this tag or commit in tests of version changes
    #[arg(long, value_name = "REVISION")]
    previous: Option<String>,
    /// Parts of test names, and options of the test binary such as --nocapture
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    filter: Vec<String>,
}

impl Faults {
    pub(crate) fn run(self) -> Result<()> {
        let agent = test::prepare()?;
        let mut test = cargo("test");
        test.args(HOST_CRATES).args(["--test", "faults", "--", "--include-ignored", "--show-output"]);
        // Each test needs the machine for itself.
        test.arg("--test-threads=1").args(self.filter).env("IMDS_AGENT", agent);
        if let Some(revision) = &self.previous {
            test.env("IMDS_PREVIOUS_AGENT", build(revision)?);
        }
        execute(&mut test)
    }
}

/// Builds the agent of another revision and returns its path.
fn build(revision: &str) -> Result<PathBuf> {
    let target = artifacts("previous")?;
    let sources = target.join("sources");
    let git = |arguments: &[&str]| {
        let mut git = Command::new("git");
        git.arg("-C").arg(root()).args(arguments);
        git
    };
    // Replaces the worktree of an aborted run.
    execute(git(&["worktree", "add", "--force", "--force", "--detach"]).arg(&sources).arg(revision))?;
    let mut agent = cargo("build");
    agent.args(["--release", "--locked", "--package", "imds-agent", "--manifest-path"]);
    let built = execute(agent.arg(sources.join("Cargo.toml")).arg("--target-dir").arg(&target));
    execute(git(&["worktree", "remove", "--force"]).arg(&sources))?;
    built?;
    Ok(target.join("release/imds-agent"))
}
