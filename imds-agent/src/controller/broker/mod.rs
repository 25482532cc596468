//! Starts and supervises `imds-broker`, which answers the requests of pods with a scoped exemption, and explains denials to others.
//!
//! The broker runs while a listener needs it. If it ends or does not answer, the agent starts it again after a delay. All
//! listeners end with it, so that connections of these pods are refused in the meantime.

pub(super) mod channel;
mod process;

use std::{fs, future::pending, os::fd::OwnedFd, path::PathBuf, time::Duration};

use imds_broker::protocol::{FromBroker, ToBroker};
use tokio::time::{Instant, sleep_until};

use self::process::Process;

/// File name of the program, in the directory of the agent.
const PROGRAM: &str = "imds-broker";
/// Shortest and longest delay before the broker is started again.
const RESTART_DELAYS: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(30));

/// Event of the broker.
#[derive(Debug)]
pub(super) enum BrokerEvent {
    /// The broker is ready to serve listeners.
    Ready,
    /// Message about a listener or a request.
    Message(FromBroker),
    /// The broker has ended, and with it all listeners.
    Ended,
}

/// The broker, and its restarts.
#[derive(Debug)]
pub(super) struct Broker {
    program: PathBuf,
    process: Option<Process>,
    /// Time of the next start, if the broker is needed and does not run.
    start_at: Option<Instant>,
    /// Number of consecutive failures.
    failures: u32,
    /// Number of starts after the first one of a period in which the broker was needed.
    pub(super) restarts: u64,
    /// Reason why the broker does not run or is not ready, if it is needed.
    pub(super) error: Option<String>,
}

impl Broker {
    /// Creates a supervisor that does not run `program` yet. Default: the one beside the agent's executable.
    pub(super) fn new(program: Option<PathBuf>) -> Self {
        Self {
            program: program.unwrap_or_else(default_program),
            process: None,
            start_at: None,
            failures: 0,
            restarts: 0,
            error: None,
        }
    }

    /// Starts the broker if it is needed and does not run, and stops it if it is not needed.
    pub(super) fn set_needed(&mut self, is_needed: bool) {
        if !is_needed {
            if self.process.take().is_some() {
                log::info!("stopped {}: no pod needs it", self.program.display());
            }
            (self.start_at, self.failures, self.error) = (None, 0, None);
        } else if self.process.is_none() && self.start_at.is_none() {
            self.start();
        }
    }

    fn start(&mut self) {
        self.start_at = None;
        match Process::start(&self.program) {
            Ok(process) => {
                log::info!("started {}, pid {}", self.program.display(), process.id());
                self.error = Some("the broker is not ready yet".to_owned());
                self.process = Some(process);
            }
            Err(error) => self.fail(format!("failed to start {}: {error}", self.program.display())),
        }
    }

    /// Ends the broker after an error, and schedules its next start.
    fn fail(&mut self, error: String) {
        let (shortest, longest) = RESTART_DELAYS;
        let ended = self.process.take();
        if ended.as_ref().is_some_and(Process::was_healthy) {
            self.failures = 0;
        }
        let delay = shortest.saturating_mul(1 << self.failures.min(16)).min(longest);
        self.failures += 1;
        log::error!("{error}: pods that it serves are refused; next start in {:.1} s", delay.as_secs_f32());
        self.error = Some(error);
        self.start_at = Some(Instant::now() + delay);
    }

    /// Reports whether the broker can serve listeners.
    pub(super) fn is_ready(&self) -> bool {
        self.process.as_ref().is_some_and(Process::is_ready)
    }

    /// Returns the process id and the effective user of the ready broker.
    pub(super) fn identity(&self) -> Option<(u32, u32)> {
        let pid = self.process.as_ref().filter(|process| process.is_ready())?.id();
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let uids = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
        Some((pid, uids.split_whitespace().nth(1)?.parse().ok()?))
    }

    /// Sends a message, with the descriptor of a listener if it is [`ToBroker::Listen`].
    pub(super) fn send(&mut self, message: ToBroker, listener: Option<OwnedFd>) {
        if let Some(process) = &mut self.process {
            process.send(message, listener);
        }
    }

    /// Waits until [`Broker::poll`] has something to do.
    pub(super) async fn changed(&self) {
        match (&self.process, self.start_at) {
            (Some(process), _) => process.changed().await,
            (None, Some(at)) => sleep_until(at).await,
            (None, None) => pending().await,
        }
    }

    /// Starts the broker if it is time, sends queued messages, and returns the events since the last call.
    pub(super) fn poll(&mut self) -> Vec<BrokerEvent> {
        if self.start_at.is_some_and(|at| at <= Instant::now()) {
            self.restarts += 1;
            self.start();
        }
        let Some(process) = &mut self.process else { return Vec::new() };
        let (mut events, failure) = process.poll();
        if process.is_ready() {
            self.error = None;
        }
        if let Some(failure) = failure {
            self.fail(failure);
            events.push(BrokerEvent::Ended);
        }
        events
    }
}

fn default_program() -> PathBuf {
    let own = std::env::current_exe().unwrap_or_default();
    own.with_file_name(PROGRAM)
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn wait_for_failure(broker: &mut Broker) {
        for _ in 0..100 {
            tokio::time::timeout(Duration::from_secs(10), broker.changed()).await.unwrap();
            if broker.poll().iter().any(|event| matches!(event, BrokerEvent::Ended)) {
                return;
            }
        }
        panic!("the broker did not end");
    }

    #[tokio::test]
    async fn broker_that_ends_is_started_again() {
        let mut broker = Broker::new(Some("/bin/true".into()));
        broker.set_needed(true);
        assert!(!broker.is_ready());
        for starts in 0..3 {
            wait_for_failure(&mut broker).await;
            assert_eq!(broker.restarts, starts);
            assert!(broker.error.as_ref().unwrap().contains("the broker ended"));
        }
        broker.set_needed(false);
        assert!(broker.error.is_none() && broker.start_at.is_none() && broker.process.is_none());
    }

    #[tokio::test]
    async fn missing_program_is_an_error() {
        let mut broker = Broker::new(Some("/nonexistent".into()));
        broker.set_needed(true);
        assert!(broker.error.as_ref().unwrap().starts_with("failed to start /nonexistent: "));
        assert!(broker.start_at.is_some());
        assert!(broker.poll().is_empty());
    }
}
