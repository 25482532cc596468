//! The command `cargo xtask test`.

use std::{env, path::PathBuf, process::Command, thread};

use anyhow::Result;

use crate::{
    setup::{self, Purpose},
    unpacked_program,
    workspace::{artifacts, cargo, ensure_root, execute, print_status},
};

/// Run the tests of all crates; needs root, changes nothing outside of its own namespaces
#[derive(clap::Args)]
pub(crate) struct Test {
    /// Parts of test names, and options of the test binaries such as --nocapture
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    filter: Vec<String>,
}

/// Number of tests that run at a time, for Rust's test harness.
const TEST_THREADS: &str = "RUST_TEST_THREADS";

/// All crates except the BPF one, which does not run on a host.
pub(crate) const HOST_CRATES: [&str; 4] = ["--workspace", "--exclude", "imds-ebpf", "--locked"];

impl Test {
    pub(crate) fn run(self) -> Result<()> {
        let agent = prepare()?;
        let mut test = cargo("test");
        test.args(HOST_CRATES).arg("--no-fail-fast").arg("--").args(self.filter).env("IMDS_AGENT", agent);
        if env::var_os(TEST_THREADS).is_none() {
            // Tests mostly wait for replies that the agent prevents.
            let cpus = thread::available_parallelism().map_or(1, Into::into);
            test.env(TEST_THREADS, (2 * cpus).to_string());
        }
        for program in unpacked_program::OF_TESTS {
            match program.path() {
                Ok(path) => drop(test.env(program.variable, path)),
                Err(error) => print_status(format_args!("NOT running {}: {error:#}", program.part)),
            }
        }
        execute(&mut test)
    }
}

/// Builds the tests and the agent, and returns the agent's path.
pub(crate) fn prepare() -> Result<PathBuf> {
    ensure_root(
        "the tests load BPF programs and create network namespaces: \
             run them as root, e.g. `sudo -E env \"PATH=$PATH\" cargo xtask test`",
    )?;
    let agent = artifacts("debug")?.join("imds-agent");
    setup::ensure(Purpose::Test)?;
    execute(&mut build_command())?;
    Ok(agent)
}

/// Returns the command that builds the agent and all tests: together, so that cargo selects the same features for both and
/// compiles nothing twice.
pub(crate) fn build_command() -> Command {
    let mut build = cargo("build");
    build.args(HOST_CRATES).args(["--bins", "--tests"]);
    build
}
