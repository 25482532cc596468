//! A virtual machine, from its start to its end.

use std::{
    fmt,
    fs::File,
    io::Read as _,
    path::Path,
    process::{Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use super::tools::Tools;
use crate::arch::Arch;

const POLL: Duration = Duration::from_millis(50);

/// Parameters of a virtual machine.
#[derive(Debug)]
pub(super) struct Machine<'a> {
    pub(super) kernel: &'a Path,
    pub(super) initramfs: &'a Path,
    pub(super) accel: &'a str,
    /// Additional parameters of the kernel command line.
    pub(super) boot: &'a str,
    /// File that receives the console output.
    pub(super) log: &'a Path,
    pub(super) timeout: Duration,
}

/// Kind of a machine's end. QEMU's exit code is the same after a panic of the kernel.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum MachineEnd {
    ByItself,
    TimedOut(Duration),
}

impl fmt::Display for MachineEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ByItself => f.write_str("ended early"),
            Self::TimedOut(timeout) => write!(f, "did not end within {} s", timeout.as_secs()),
        }
    }
}

impl Machine<'_> {
    /// Runs the machine until it powers off. Calls `on_line` with each complete line of its console.
    pub(super) fn run(&self, tools: &Tools, mut on_line: impl FnMut(&str)) -> Result<MachineEnd> {
        let console =
            File::create(self.log).with_context(|| format!("failed to write {}", self.log.display()))?;
        let mut command = at_lowest_priority(&tools.qemu()?);
        // pauth-impdef: the standard algorithm of pointer authentication doubles the time of a run.
        let (machine, slow_cpu, fast_cpu, serial) = match tools.arch {
            Arch::Amd64 => ("q35", "qemu64", "max", "ttyS0"),
            Arch::Arm64 => ("virt", "max,pauth-impdef=on", "max", "ttyAMA0"),
        };
        // One CPU: with two CPUs in separate threads of QEMU 7.2's TCG, Linux 7.2 panicked in two of four runs of the
        // tests that attach to TCX ("Oops: int3", in code that it was patching). With two CPUs in one thread, it
        // panicked in none of four runs.
        if self.accel == "tcg" {
            // The clock of the machine counts executed instructions, so that deadlines do not depend on the load of the
            // host, and idle time costs nothing.
            command.args(["-icount", "shift=2,sleep=off"]);
            // qemu64 lacks AVX, whose emulation takes more instructions than it saves.
            command.args(["-cpu", slow_cpu]);
        } else {
            command.args(["-cpu", fast_cpu]);
        }
        command
            .args(["-accel", self.accel, "-machine", machine, "-smp", "1", "-m", "1024"])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot"])
            .arg("-append")
            .arg(format!("console={serial} panic=-1 mitigations=off quiet {}", self.boot))
            .arg("-kernel")
            .arg(self.kernel)
            .arg("-initrd")
            .arg(self.initramfs)
            .stdin(Stdio::null())
            .stdout(console);
        let mut console = Console::open(self.log)?;
        let mut child = command.spawn().context("failed to start QEMU")?;
        let start = Instant::now();
        while child.try_wait().context("failed to wait for QEMU")?.is_none() {
            if start.elapsed() > self.timeout {
                child.kill().context("failed to stop QEMU")?;
                child.wait().context("failed to wait for QEMU")?;
                return Ok(MachineEnd::TimedOut(self.timeout));
            }
            console.read(&mut on_line)?;
            sleep(POLL);
        }
        console.read(&mut on_line)?;
        Ok(MachineEnd::ByItself)
    }
}

/// Returns a command that leaves the CPUs to other programs, such as tests that measure times. The clock of an emulated machine does not
/// notice it.
fn at_lowest_priority(command: &Command) -> Command {
    let mut nice = Command::new("nice");
    nice.args(["-n", "19"]).arg(command.get_program()).args(command.get_args());
    let variables = command.get_envs().filter_map(|(name, value)| Some((name, value?)));
    nice.envs(variables);
    nice
}

/// A console to which the machine is still writing.
struct Console {
    log: File,
    /// Incomplete last line of the console.
    rest: Vec<u8>,
}

impl Console {
    fn open(log: &Path) -> Result<Self> {
        let log = File::open(log).with_context(|| format!("failed to read {}", log.display()))?;
        Ok(Self { log, rest: Vec::new() })
    }

    fn read(&mut self, mut on_line: impl FnMut(&str)) -> Result<()> {
        self.log.read_to_end(&mut self.rest).context("failed to read a console")?;
        if let Some(end) = self.rest.iter().rposition(|&byte| byte == b'\n') {
            let lines: Vec<u8> = self.rest.drain(..=end).collect();
            String::from_utf8_lossy(&lines).lines().for_each(|line| on_line(line.trim_end()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn only_complete_lines_are_reported() {
        let log = tempfile::NamedTempFile::new().unwrap();
        let mut console = Console::open(log.path()).unwrap();
        let mut lines = Vec::new();
        for text in ["one\r\ntw", "one\r\ntwo\r\n", "one\r\ntwo\r\nthree"] {
            fs::write(log.path(), text).unwrap();
            console.read(|line| lines.push(line.to_owned())).unwrap();
        }
        assert_eq!(lines, ["one", "two"]);
    }
}
