//! Runs the tests on this machine's own kernel without emulation. Tests that may harm the machine are skipped.

use std::{
    fs::{self, File},
    path::Path,
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context as _, Result};
use nix::sys::utsname::uname;

use super::plan::{Plan, Planned};
use crate::workspace::ensure_root;

/// Runs the planned tests and writes the same output to `log` as a machine's console. Calls `tell` with the name of
/// each finished executable.
pub(super) fn run(plan: &Plan, log: &Path, mut tell: impl FnMut(&str)) -> Result<()> {
    ensure_root("the tests load BPF programs and create network namespaces: run them as root")?;
    let release = uname().context("failed to get the kernel release")?;
    let brief = if plan.is_brief { "@brief\n" } else { "" };
    let start = format!("@kernel {}\n{brief}", release.release().display());
    fs::write(log, start).with_context(|| format!("failed to write {}", log.display()))?;
    let mut is_good = true;
    for planned in &plan.tests {
        is_good &= run_one(planned, &plan.agent, log)?;
        tell(&planned.name);
    }
    append(log, &format!("TEST-RC={}", u8::from(!is_good)))
}

fn run_one(planned: &Planned, agent: &Path, log: &Path) -> Result<bool> {
    let arguments: Vec<_> = planned.arguments().collect();
    append(log, &format!("@begin {} {}", planned.name, arguments.join(" ")))?;
    let start = Instant::now();
    let mut test = Command::new(&planned.path);
    test.arg("--show-output").args(arguments).env("IMDS_AGENT", agent);
    let code = execute(&mut test, log)?;
    append(log, &format!("@end {} {code} {}", planned.name, start.elapsed().as_secs()))?;
    Ok(code == 0)
}

/// Appends a line to a log.
fn append(log: &Path, line: &str) -> Result<()> {
    let written = open(log)
        .and_then(|mut log| Ok(std::io::Write::write_all(&mut log, format!("{line}\n").as_bytes())?));
    written.with_context(|| format!("failed to write {}", log.display()))
}

fn open(log: &Path) -> Result<File> {
    Ok(File::options().append(true).open(log)?)
}

/// Runs a command and appends its output to the log.
fn execute(command: &mut Command, log: &Path) -> Result<i32> {
    let (output, errors) = (open(log)?, open(log)?);
    let status = command.stdin(Stdio::null()).stdout(output).stderr(errors).status();
    let status = status.with_context(|| format!("failed to start {}", command.get_program().display()))?;
    Ok(status.code().unwrap_or(-1))
}
