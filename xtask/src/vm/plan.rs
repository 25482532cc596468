//! Which tests run, and how much of each.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use imds_tests::EFFORT;

use super::build::Payload;

/// How many times less of the longest tests is done with `--quick`.
const DIVISOR: u32 = 20;
/// Test executables that `--quick` leaves out: what they are about is the least up to the kernel.
const LEFT_OUT: [&str; 5] = ["follow", "harness", "pins", "refusals", "restore"];

/// What a machine is to do.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) agent: PathBuf,
    /// Test executables, by name.
    pub(super) tests: Vec<(String, PathBuf)>,
    /// Their arguments.
    pub(super) arguments: Vec<String>,
    /// Variables of their environment, as `NAME=VALUE`.
    pub(super) environment: Vec<String>,
}

impl Plan {
    /// All tests, those of `filter`, or `is_quick` ones.
    pub(super) fn new(payload: Payload, filter: &[String], is_quick: bool) -> Result<Self> {
        let mut tests = Vec::new();
        for (name, path) in payload.tests {
            let is_left_out = is_quick && LEFT_OUT.contains(&name.as_str());
            if !is_left_out && (filter.is_empty() || has_tests(&path, filter)?) {
                tests.push((name, path));
            }
        }
        if tests.is_empty() {
            bail!("no test has {} in its name", filter.join(" or "));
        }
        let environment = is_quick.then(|| format!("{EFFORT}={DIVISOR}"));
        let environment = environment.into_iter().collect();
        Ok(Self { agent: payload.agent, tests, arguments: filter.to_vec(), environment })
    }

    /// The test executables' names.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.tests.iter().map(|(name, _)| name.as_str())
    }
}

/// Whether an executable has tests of these names: it runs here, too.
fn has_tests(executable: &Path, filter: &[String]) -> Result<bool> {
    let mut list = Command::new(executable);
    let output = list.args(["--list", "--format", "terse"]).args(filter).output();
    let output = output.with_context(|| format!("could not start {}", executable.display()))?;
    Ok(String::from_utf8_lossy(&output.stdout).lines().any(|line| line.ends_with(": test")))
}
