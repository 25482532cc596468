//! Starts and supervises `imds-broker`, which answers the requests of pods with a scoped exemption, and explains denials to others.
//!
//! The broker runs while a listener needs it. If it ends or does not answer, the agent starts it again after a delay. All
//! listeners end with it, so that connections of these pods are refused in the meantime.

pub(super) mod channel;

use std::{
    collections::{BTreeSet, VecDeque},
    fs,
    future::pending,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::Duration,
};

use imds_broker::protocol::{FromBroker, ToBroker};
use tokio::time::{Instant, sleep_until};

use self::channel::{Channel, Received};

/// File name of the program, in the directory of the agent.
const PROGRAM: &str = "imds-broker";
/// Time limit for the broker to become ready, and to answer a request for a listener.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Shortest and longest delay before the broker is started again.
const RESTART_DELAYS: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(30));
/// Time after which a broker counts as healthy, so that the next restart has the shortest delay.
const HEALTHY_AFTER: Duration = Duration::from_secs(10);
/// Time limit for the broker to end after its socket is closed, and the poll interval.
const END_TIMEOUT: Duration = Duration::from_secs(1);
const END_POLL: Duration = Duration::from_millis(2);
/// Largest number of messages to read before other event sources have their turn.
const MESSAGE_BATCH: usize = 256;

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

#[derive(Debug)]
struct Process {
    child: Child,
    channel: Channel,
    started: Instant,
    is_ready: bool,
    queue: VecDeque<(ToBroker, Option<OwnedFd>)>,
    /// Listeners that the broker was asked for and has not answered.
    unanswered: BTreeSet<u32>,
    /// Time of the last answer, or of the first question after it.
    answered: Instant,
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
                log::info!("started {}, pid {}", self.program.display(), process.child.id());
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
        if ended.is_some_and(|process| process.is_ready && process.started.elapsed() >= HEALTHY_AFTER) {
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
        self.process.as_ref().is_some_and(|process| process.is_ready)
    }

    /// Returns the process id and the effective user of the ready broker.
    pub(super) fn identity(&self) -> Option<(u32, u32)> {
        let pid = self.process.as_ref().filter(|process| process.is_ready)?.child.id();
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let uids = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
        Some((pid, uids.split_whitespace().nth(1)?.parse().ok()?))
    }

    /// Sends a message, with the descriptor of a listener if it is [`ToBroker::Listen`].
    pub(super) fn send(&mut self, message: ToBroker, listener: Option<OwnedFd>) {
        let Some(process) = &mut self.process else { return };
        match message {
            ToBroker::Listen { id, .. } => {
                if process.unanswered.is_empty() {
                    process.answered = Instant::now();
                }
                process.unanswered.insert(id);
            }
            ToBroker::Close { id } => drop(process.unanswered.remove(&id)),
        }
        process.queue.push_back((message, listener));
        process.flush();
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
        process.flush();
        let mut events = Vec::new();
        let mut failure = None;
        for _ in 0..MESSAGE_BATCH {
            match process.channel.receive() {
                Ok(None) => break,
                Ok(Some(Received::Message(message))) => events.push(process.on_message(message)),
                Ok(Some(Received::Ended)) => failure = Some(process.end()),
                Ok(Some(Received::Invalid(error))) => {
                    failure = Some(format!("the broker sent an invalid message: {error}"));
                }
                Err(error) => failure = Some(format!("failed to read from the broker: {error}")),
            }
            if failure.is_some() {
                break;
            }
        }
        if failure.is_none() && process.deadline().is_some_and(|deadline| deadline <= Instant::now()) {
            failure = Some("the broker does not answer".to_owned());
        }
        if process.is_ready {
            self.error = None;
        }
        if let Some(failure) = failure {
            self.fail(failure);
            events.push(BrokerEvent::Ended);
        }
        events
    }
}

impl Process {
    fn start(program: &Path) -> io::Result<Self> {
        let (channel, stdin) = Channel::pair()?;
        let child = Command::new(program)
            .env_clear()
            .current_dir("/")
            .stdin(stdin)
            .stdout(Stdio::null())
            .stderr(Stdio::inherit())
            .spawn()?;
        let started = Instant::now();
        Ok(Self {
            child,
            channel,
            started,
            is_ready: false,
            queue: VecDeque::new(),
            unanswered: BTreeSet::new(),
            answered: started,
        })
    }

    async fn changed(&self) {
        let deadline = async {
            match self.deadline() {
                Some(deadline) => sleep_until(deadline).await,
                None => pending().await,
            }
        };
        let writable =
            async { if self.queue.is_empty() { pending().await } else { self.channel.writable().await } };
        tokio::select! {
            () = self.channel.readable() => {}
            () = writable => {}
            () = deadline => {}
        }
    }

    /// Returns the time at which the broker counts as hanging.
    fn deadline(&self) -> Option<Instant> {
        (!self.is_ready || !self.unanswered.is_empty()).then(|| self.answered + ANSWER_TIMEOUT)
    }

    /// Sends queued messages. Each listener is closed here once it is sent. [`Broker::poll`] notices an error as the end of the
    /// broker.
    fn flush(&mut self) {
        while let Some((message, listener)) = self.queue.front() {
            match self.channel.send(message, listener.as_ref()) {
                Ok(true) => drop(self.queue.pop_front()),
                Ok(false) => return,
                Err(error) => {
                    log::debug!("failed to send a message to the broker: {error}");
                    self.queue.clear();
                }
            }
        }
    }

    fn on_message(&mut self, message: FromBroker) -> BrokerEvent {
        match &message {
            FromBroker::Ready {} => {
                self.is_ready = true;
                self.answered = Instant::now();
                return BrokerEvent::Ready;
            }
            FromBroker::Listening { id } | FromBroker::Closed { id, .. } => {
                self.unanswered.remove(id);
                self.answered = Instant::now();
            }
            FromBroker::Request(_) => {}
        }
        BrokerEvent::Message(message)
    }

    /// Ends the process. Returns the reason of its end.
    fn end(&mut self) -> String {
        match self.reap() {
            Ok(Some(status)) => format!("the broker ended: {status}"),
            Ok(None) => format!("the broker does not end, pid {}", self.child.id()),
            Err(error) => format!("the broker ended: {error}"),
        }
    }

    /// Ends and reaps the process. Returns `None` if it does not end within [`END_TIMEOUT`].
    ///
    /// The signal fails without `CAP_KILL`, because the broker has another user. The broker ends also because its socket closes.
    fn reap(&mut self) -> io::Result<Option<ExitStatus>> {
        self.channel.shut_down();
        let _denied_or_ended = self.child.kill();
        let start = Instant::now();
        loop {
            match self.child.try_wait()? {
                None if start.elapsed() < END_TIMEOUT => thread::sleep(END_POLL),
                ended => return Ok(ended),
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !matches!(self.reap(), Ok(Some(_))) {
            log::warn!("failed to end the broker, pid {}", self.child.id());
        }
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
