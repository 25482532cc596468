//! A virtual machine, from its start to its end.

use std::{
    fmt,
    fs::File,
    path::Path,
    process::Stdio,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use super::tools::Tools;

const POLL: Duration = Duration::from_millis(50);

/// What a machine is made of.
#[derive(Debug)]
pub(super) struct Machine<'a> {
    pub(super) kernel: &'a Path,
    pub(super) initramfs: &'a Path,
    pub(super) accel: &'a str,
    /// Where its console goes.
    pub(super) log: &'a Path,
    pub(super) timeout: Duration,
}

/// How a machine ended. QEMU's exit code says no more than that it ran, also after a panic of the kernel.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum End {
    ByItself,
    TimedOut(Duration),
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ByItself => f.write_str("ended early"),
            Self::TimedOut(timeout) => write!(f, "did not end within {} s", timeout.as_secs()),
        }
    }
}

impl Machine<'_> {
    /// Runs it until it powers off.
    pub(super) fn run(&self, tools: &Tools) -> Result<End> {
        let console =
            File::create(self.log).with_context(|| format!("could not write {}", self.log.display()))?;
        let mut command = tools.qemu()?;
        // One processor: with two, each a thread of QEMU 7.2's TCG, Linux 7.2 panicked in two of four runs of the tests
        // that attach to TCX ("Oops: int3", in code that it was patching); with two in one thread, in none of four.
        command
            .args(["-accel", self.accel, "-cpu", "max", "-machine", "q35", "-smp", "1", "-m", "1024"])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot"])
            .args(["-append", "console=ttyS0 panic=-1 mitigations=off quiet"])
            .arg("-kernel")
            .arg(self.kernel)
            .arg("-initrd")
            .arg(self.initramfs)
            .stdin(Stdio::null())
            .stdout(console);
        let mut child = command.spawn().context("could not start QEMU")?;
        let start = Instant::now();
        while child.try_wait().context("could not wait for QEMU")?.is_none() {
            if start.elapsed() > self.timeout {
                child.kill().context("could not stop QEMU")?;
                child.wait().context("could not wait for QEMU")?;
                return Ok(End::TimedOut(self.timeout));
            }
            sleep(POLL);
        }
        Ok(End::ByItself)
    }
}
