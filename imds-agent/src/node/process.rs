//! Handle of a process that cannot refer to another process after its PID is reused.

use std::{
    fs::File,
    io::{self, Read as _},
    os::fd::OwnedFd,
    path::Path,
    time::Duration,
};

use nix::{
    fcntl::{OFlag, open, openat},
    sys::stat::Mode,
    time::{ClockId, clock_gettime},
};

/// Mount point of the proc file system.
pub(super) const PROC: &str = "/proc";
/// Milliseconds per clock tick of /proc (`USER_HZ`, include/asm-generic/param.h).
const TICK: u64 = 10;

/// Open directory of a process in /proc. Once the process is reaped, reads through it fail, even if its PID was reused.
#[derive(Debug)]
pub(super) struct Process {
    directory: OwnedFd,
}

impl Process {
    /// Opens the process with this PID. Returns `None` if it does not exist or is a zombie.
    pub(super) fn open(pid: u32) -> io::Result<Option<Self>> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let opened =
            open(&Path::new(PROC).join(pid.to_string()), flags, Mode::empty()).map_err(io::Error::from);
        let Some(directory) = unless_gone(opened)? else { return Ok(None) };
        let process = Self { directory };
        Ok(process.is_alive()?.then_some(process))
    }

    /// Reports whether the process still exists and is not a zombie.
    pub(super) fn is_alive(&self) -> io::Result<bool> {
        Ok(self.started()?.is_some())
    }

    /// Returns the start time of the process in clock ticks since boot, or `None` if it has ended.
    pub(super) fn started(&self) -> io::Result<Option<u64>> {
        let mut text = Vec::new();
        let read = self.read("stat").and_then(|mut stat| stat.read_to_end(&mut text));
        Ok(unless_gone(read)?.and_then(|_| started(&text)))
    }

    /// Returns the time since the start of the process, rounded up to a clock tick, or `None` if it has ended.
    pub(super) fn age(&self) -> io::Result<Option<Duration>> {
        let Some(ticks) = self.started()? else { return Ok(None) };
        let since_boot = Duration::from(clock_gettime(ClockId::CLOCK_BOOTTIME)?);
        Ok(Some(since_boot.saturating_sub(Duration::from_millis(ticks.saturating_mul(TICK)))))
    }

    /// Opens the network namespace of the process, or returns `None` if it has ended.
    pub(super) fn netns(&self) -> io::Result<Option<File>> {
        unless_gone(self.read("ns/net"))
    }

    fn read(&self, name: &str) -> io::Result<File> {
        Ok(openat(&self.directory, name, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?.into())
    }
}

/// Turns the errors that mean that a process has ended into `None`.
fn unless_gone<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Returns the start time in /proc/PID/stat, or `None` for a zombie. The second field is the name in parentheses, which
/// can contain any characters (proc(5)).
fn started(stat: &[u8]) -> Option<u64> {
    let behind_name = stat.rsplit(|&byte| byte == b')').next().filter(|rest| rest.len() < stat.len())?;
    let mut fields = str::from_utf8(behind_name).ok()?.split_ascii_whitespace();
    let state = fields.next()?;
    // The 22nd field; the state is the third.
    let started = fields.nth(18)?.parse().ok()?;
    (!matches!(state, "Z" | "X" | "x")).then_some(started)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn proc_stat_line() {
        let line = |state: &str| {
            format!("7 (a) S (b) {state} 1 7 7 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 4711 2 3 4\n")
                .into_bytes()
        };
        assert_eq!((started(&line("S")), started(&line("Z"))), (Some(4711), None));
        for broken in ["", "7 (a", "7 (a)", "7 (a) ", "7 (a) S 1"] {
            assert_eq!(started(broken.as_bytes()), None, "{broken}");
        }
    }

    #[test]
    fn ended_process_is_not_found() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let process = Process::open(child.id()).unwrap().unwrap();
        assert!(process.is_alive().unwrap() && process.netns().unwrap().is_some());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!process.is_alive().unwrap());
        assert!(process.netns().unwrap().is_none() && Process::open(child.id()).unwrap().is_none());
    }
}
