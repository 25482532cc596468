//! A running broker, and the messages between it and the agent.

use std::{
    collections::{BTreeSet, VecDeque},
    future::pending,
    io,
    os::fd::OwnedFd,
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::Duration,
};

use imds_broker::protocol::{FromBroker, ToBroker};
use tokio::time::{Instant, sleep_until};

use super::{
    BrokerEvent,
    channel::{Channel, Received},
};

/// Time limit for the broker to become ready, and to answer a message.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Time without an answer after which the agent asks for one.
const PING_INTERVAL: Duration = Duration::from_secs(5);
/// Time after which a broker counts as healthy, so that the next restart has the shortest delay.
const HEALTHY_AFTER: Duration = Duration::from_secs(10);
/// Time limit for the broker to end after its socket is closed, and the poll interval.
const END_TIMEOUT: Duration = Duration::from_secs(1);
const END_POLL: Duration = Duration::from_millis(2);
/// Largest number of messages to read before other event sources have their turn.
const MESSAGE_BATCH: usize = 256;

/// Broker process, which has not been reaped.
#[derive(Debug)]
pub(super) struct Process {
    child: Child,
    channel: Channel,
    started: Instant,
    is_ready: bool,
    queue: VecDeque<(ToBroker, Option<OwnedFd>)>,
    /// Listeners that the broker was asked for and has not answered.
    unanswered: BTreeSet<u32>,
    is_pinged: bool,
    /// Time of the last answer, or of the first question after it.
    answered: Instant,
}

impl Process {
    pub(super) fn start(program: &Path) -> io::Result<Self> {
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
            is_pinged: false,
            answered: started,
        })
    }

    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(super) fn is_ready(&self) -> bool {
        self.is_ready
    }

    /// Reports whether the process was ready for so long that its end is not a failed start.
    pub(super) fn was_healthy(&self) -> bool {
        self.is_ready && self.started.elapsed() >= HEALTHY_AFTER
    }

    /// Queues a message, and sends what the socket has room for.
    pub(super) fn send(&mut self, message: ToBroker, listener: Option<OwnedFd>) {
        if !self.owes_answer() {
            self.answered = Instant::now();
        }
        match message {
            ToBroker::Listen { id, .. } => drop(self.unanswered.insert(id)),
            ToBroker::Close { id } => drop(self.unanswered.remove(&id)),
            ToBroker::Ping {} => self.is_pinged = true,
        }
        self.queue.push_back((message, listener));
        self.flush();
    }

    /// Waits until [`Process::poll`] has something to do.
    pub(super) async fn changed(&self) {
        let writable =
            async { if self.queue.is_empty() { pending().await } else { self.channel.writable().await } };
        tokio::select! {
            () = self.channel.readable() => {}
            () = writable => {}
            () = sleep_until(self.next_check()) => {}
        }
    }

    /// Sends queued messages, and asks a silent broker for an answer. Returns the events since the last call, and the reason why the
    /// process failed if it has.
    pub(super) fn poll(&mut self) -> (Vec<BrokerEvent>, Option<String>) {
        self.flush();
        let mut events = Vec::new();
        for _ in 0..MESSAGE_BATCH {
            let failure = match self.channel.receive() {
                Ok(None) => break,
                Ok(Some(Received::Message(message))) => {
                    events.push(self.on_message(message));
                    continue;
                }
                Ok(Some(Received::Ended)) => self.end(),
                Ok(Some(Received::Invalid(error))) => format!("the broker sent an invalid message: {error}"),
                Err(error) => format!("failed to read from the broker: {error}"),
            };
            return (events, Some(failure));
        }
        if self.next_check() <= Instant::now() {
            if self.owes_answer() {
                return (events, Some("the broker does not answer".to_owned()));
            }
            self.send(ToBroker::Ping {}, None);
        }
        (events, None)
    }

    fn owes_answer(&self) -> bool {
        !self.is_ready || self.is_pinged || !self.unanswered.is_empty()
    }

    /// Returns the time at which the broker counts as hanging if it owes an answer, or else is asked for one.
    fn next_check(&self) -> Instant {
        self.answered + if self.owes_answer() { ANSWER_TIMEOUT } else { PING_INTERVAL }
    }

    /// Sends queued messages. Each listener is closed here once it is sent. [`Process::poll`] notices an error as the end of the
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
            FromBroker::Ready {} => self.is_ready = true,
            FromBroker::Pong {} => self.is_pinged = false,
            FromBroker::Listening { id } | FromBroker::Closed { id, .. } => drop(self.unanswered.remove(id)),
            FromBroker::Request(_) => return BrokerEvent::Message(message),
        }
        self.answered = Instant::now();
        if matches!(message, FromBroker::Ready {}) {
            BrokerEvent::Ready
        } else {
            BrokerEvent::Message(message)
        }
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
