//! The command `cargo xtask build`.

use std::{env, path::PathBuf, process::Command};

use anyhow::{Context as _, Result};

use crate::{
    setup::{self, Purpose},
    workspace::{artifacts, cargo, execute, print_status, root},
};

/// Cargo profile of the shipped binaries.
pub(crate) const SHIPPED_PROFILE: &str = "static";

pub(crate) fn run() -> Result<()> {
    print_status(format_args!("built {}", release()?.display()));
    Ok(())
}

/// Builds the agent and its broker in release mode. Returns the path of the agent.
pub(crate) fn release() -> Result<PathBuf> {
    let agent = artifacts("release")?.join("imds-agent");
    setup::ensure(Purpose::Build)?;
    execute(
        cargo("build")
            .args(["--release", "--package", "imds-agent", "--package", "imds-broker"])
            .env("IMDS_COMMIT", commit()),
    )?;
    Ok(agent)
}

/// Builds the agent and its broker with the profile of `cargo xtask dist`. Returns the path of the agent.
pub(crate) fn shipped() -> Result<PathBuf> {
    let agent = artifacts(SHIPPED_PROFILE)?.join("imds-agent");
    let packages = ["--package", "imds-agent", "--package", "imds-broker"];
    execute(cargo("build").args(["--profile", SHIPPED_PROFILE]).args(packages).arg("--locked"))?;
    Ok(agent)
}

/// Builds the agent and its broker for a trial, and returns the path of the agent: without optimizations, with the dependencies
/// that xtask and the tests use too, which takes a fraction of the time.
pub(crate) fn debug() -> Result<PathBuf> {
    let agent = artifacts("debug")?.join("imds-agent");
    setup::ensure(Purpose::Build)?;
    execute(cargo("build").args(["--package", "imds-agent", "--package", "imds-broker", "--locked"]))?;
    Ok(agent)
}

/// Returns the current commit, with the suffix `-dirty` if files were changed since, or `unknown` without git.
pub(crate) fn commit() -> String {
    let Some(commit) = git(&["rev-parse", "HEAD"]) else { return "unknown".to_owned() };
    let is_clean =
        git(&["status", "--porcelain", "--untracked-files=no"]).is_some_and(|changes| changes.is_empty());
    if is_clean { commit } else { format!("{commit}-dirty") }
}

/// Returns the time of the files in reproducible archives, in seconds since 1970: `SOURCE_DATE_EPOCH` if it is set, the
/// time of the commit otherwise.
pub(crate) fn time() -> Result<u64> {
    let set = env::var("SOURCE_DATE_EPOCH").ok();
    let time = set.or_else(|| git(&["show", "--no-patch", "--format=%ct"])).unwrap_or_else(|| "0".to_owned());
    time.parse().with_context(|| format!("{time} is not a number of seconds"))
}

fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).current_dir(root()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
