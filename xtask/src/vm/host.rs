//! Runs the tests on this machine's own kernel without emulation. Tests that may harm the machine are skipped.

use std::{
    fs::File,
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context as _, Result};
use nix::sys::utsname::uname;

use super::plan::{Plan, Planned};
use crate::workspace::ensure_root;

const LOG_FAILED: &str = "failed to write the log of the tests";

/// Runs the planned tests and writes the same output to `log` as a machine's console. Calls `tell` with the name of
/// each finished executable.
pub(super) fn run(plan: &Plan, log: &Path, mut tell: impl FnMut(&str)) -> Result<()> {
    ensure_root("the tests load BPF programs and create network namespaces: run them as root")?;
    let release = uname().context("failed to get the kernel release")?;
    let mut log = File::create(log).with_context(|| format!("failed to write {}", log.display()))?;
    let brief = if plan.is_brief { "@brief\n" } else { "" };
    write!(log, "@kernel {}\n{brief}", release.release().display()).context(LOG_FAILED)?;
    let mut is_good = true;
    for planned in &plan.tests {
        is_good &= run_one(planned, &plan.agent, &mut log)?;
        tell(&planned.name);
    }
    writeln!(log, "TEST-RC={}", u8::from(!is_good)).context(LOG_FAILED)
}

/// Runs a test and appends its output to the log.
fn run_one(planned: &Planned, agent: &Path, log: &mut File) -> Result<bool> {
    let arguments: Vec<_> = planned.arguments().collect();
    writeln!(log, "@begin {} {}", planned.name, arguments.join(" ")).context(LOG_FAILED)?;
    let start = Instant::now();
    let mut test = Command::new(&planned.path);
    test.arg("--show-output").args(arguments).env("IMDS_AGENT", agent);
    test.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log.try_clone()?);
    let status = test.status().with_context(|| format!("failed to start {}", planned.path.display()))?;
    let code = status.code().unwrap_or(-1);
    writeln!(log, "@end {} {code} {}", planned.name, start.elapsed().as_secs()).context(LOG_FAILED)?;
    Ok(code == 0)
}
