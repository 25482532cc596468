//! Supervision of a child in the foreground, with forwarding of signals.

use std::{
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    process::{Child, Command, ExitStatus},
};

use anyhow::{Context as _, Result};
use nix::{
    libc,
    sys::{
        signal::{SigSet, SigmaskHow, Signal, kill, sigprocmask},
        signalfd::{SignalFd, siginfo},
    },
    unistd::Pid,
};

/// Blocks the signals that would end this process before its cleanup, for every child except the supervised one.
/// Dropping this unblocks them.
pub(crate) struct Supervisor {
    blocked: SigSet,
    signals: SignalFd,
}

impl Supervisor {
    /// Blocks the signals for the calling thread.
    pub(crate) fn new() -> Result<Self> {
        let blocked: SigSet =
            [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGCHLD].into_iter().collect();
        blocked.thread_block().context("failed to block signals")?;
        let signals = SignalFd::new(&blocked).context("failed to open a signalfd")?;
        Ok(Self { blocked, signals })
    }

    /// Runs `command` to its end and forwards termination signals to it.
    pub(crate) fn run(&self, command: &mut Command) -> Result<ExitStatus> {
        let blocked = self.blocked;
        // SAFETY: sigprocmask is async-signal-safe, and the closure accesses only its own copy of the set.
        unsafe {
            command.pre_exec(move || Ok(sigprocmask(SigmaskHow::SIG_UNBLOCK, Some(&blocked), None)?));
        }
        let program = command.get_program().display().to_string();
        let mut child = command.spawn().with_context(|| format!("failed to start {program}"))?;
        loop {
            if let Some(status) = child.try_wait().with_context(|| format!("failed to wait for {program}"))? {
                return Ok(status);
            }
            if let Some(signal) = self.signals.read_signal().context("failed to read a signal")? {
                forward_signal(&signal, &child);
            }
        }
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        // Fails only for an invalid argument.
        let _ = self.blocked.thread_unblock();
    }
}

fn forward_signal(signal: &siginfo, child: &Child) {
    let ends = match i32::try_from(signal.ssi_signo).map(Signal::try_from) {
        // The terminal sends Ctrl-C to the whole process group, including the child.
        Ok(Ok(Signal::SIGINT)) => signal.ssi_code != libc::SI_KERNEL,
        // SIGHUP would make the child reload, but here it means that the terminal was closed, so that the child gets
        // SIGTERM.
        Ok(Ok(Signal::SIGTERM | Signal::SIGHUP)) => true,
        _ => false,
    };
    if let (true, Ok(pid)) = (ends, i32::try_from(child.id())) {
        // Fails only if the child has just ended, which SIGCHLD reports.
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
    }
}

/// Returns the exit code that a shell would report.
pub(crate) fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_code_matches_the_shell() {
        assert_eq!(exit_code(ExitStatus::from_raw(3 << 8)), 3);
        assert_eq!(exit_code(ExitStatus::from_raw(15)), 128 + 15);
    }
}
