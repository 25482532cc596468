//! Sinks: receivers of a record of each denied or audited packet or call, and of each HTTP request.
//!
//! Each sink has a thread, because files, sockets and name servers can block. Queues are bounded, so that a slow sink neither
//! delays the telemetry thread nor takes memory without a limit. The CPU time of the threads counts against the budget of
//! events.

mod log_file;
mod otlp;
mod sink_error;
mod sink_queue;
mod sink_record;
mod standard_output;
mod syslog;
#[cfg(test)]
mod tests;

use std::{
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use imds_ebpf_common::Verdict;
use tokio::sync::Notify;

pub(crate) use self::sink_queue::{SinkCounts, SinkQueue};
use self::{
    log_file::LogFileSink,
    otlp::OtlpSink,
    sink_error::{Failure, Sent, io_failed},
    sink_record::SinkRecord,
    standard_output::StdoutSink,
    syslog::SyslogSink,
};
use crate::{
    config::{Config, Environment, Events, Exempt, Sink, endpoint_set::EndpointSet},
    kube::{Backoff, pod_ref::PodRef},
    telemetry::{budget::thread_cpu_time, denial::Denial, http_request::RequestEvent},
};

/// Bounds of the delay between attempts of a failing sink.
const FIRST_DELAY: Duration = Duration::from_millis(500);
const MAX_DELAY: Duration = Duration::from_secs(30);
/// Time limit for writing the queues when the agent ends.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// Sinks of the configuration, and the names in their records.
#[derive(Clone, Debug)]
pub struct SinkSettings {
    events: Events,
    /// Name of the node in the cluster, or the host name.
    node: String,
    hostname: String,
    /// True if pods of the cluster are watched.
    watches_pods: bool,
    /// Addresses and names of the protected endpoints.
    endpoints: Vec<(IpAddr, String)>,
    /// Names of the exemption rules, in the order of their numbers.
    rules: Vec<String>,
}

impl SinkSettings {
    /// Collects the settings of a configuration that is resolved on this node.
    pub fn new(config: &Config, endpoint_set: &EndpointSet, exempt: &[Exempt]) -> Self {
        let environment = Environment::read();
        let endpoints =
            endpoint_set.endpoints.iter().map(|endpoint| (endpoint.address, endpoint.name.clone()));
        Self {
            events: config.events.clone(),
            node: config.kubernetes.node_name(&environment),
            watches_pods: config.kubernetes.access(&environment).is_some(),
            hostname: environment.hostname,
            endpoints: endpoints.collect(),
            rules: exempt.iter().map(|rule| rule.name.clone()).collect(),
        }
    }

    fn endpoint(&self, address: IpAddr) -> Option<&str> {
        self.endpoints.iter().find(|(other, _)| *other == address).map(|(_, name)| name.as_str())
    }

    /// Returns the name of the rule with this number, or the number if there is none.
    fn rule(&self, number: u32) -> String {
        let name = (number as usize).checked_sub(1).and_then(|index| self.rules.get(index));
        name.cloned().unwrap_or_else(|| number.to_string())
    }

    fn includes(&self, verdict: u8) -> bool {
        self.events.verdicts.iter().any(|&included: &Verdict| included as u8 == verdict)
    }
}

/// Queues of the configured sinks, and a notification when the error of one changes.
#[derive(Clone, Debug, Default)]
pub(crate) struct SinkStates {
    queues: Arc<Mutex<Vec<Arc<SinkQueue>>>>,
    changed: Arc<Notify>,
}

impl SinkStates {
    pub(crate) fn queues(&self) -> Vec<Arc<SinkQueue>> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until the error of a sink changes, or other sinks are configured.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    fn set(&self, queues: Vec<Arc<SinkQueue>>) {
        *self.queues.lock().unwrap_or_else(PoisonError::into_inner) = queues;
        self.changed.notify_one();
    }
}

/// Running sinks.
#[derive(Debug)]
pub(super) struct Sinks {
    settings: SinkSettings,
    running: Vec<(Sink, Arc<SinkQueue>)>,
    states: SinkStates,
}

impl Sinks {
    /// Starts the sinks of `settings`.
    pub(super) fn start(settings: SinkSettings, states: SinkStates) -> Self {
        let mut sinks = Self { settings: settings.clone(), running: Vec::new(), states };
        sinks.configure(settings);
        sinks
    }

    /// Applies other settings. Sinks whose keys do not change go on; those that are removed write their queue and end.
    pub(super) fn configure(&mut self, settings: SinkSettings) {
        let has_same_names =
            self.settings.node == settings.node && self.settings.hostname == settings.hostname;
        let mut before = std::mem::take(&mut self.running);
        for sink in &settings.events.sinks {
            let kept = before.iter().position(|(other, _)| has_same_names && other == sink);
            self.running.push(kept.map_or_else(
                || {
                    let queue = Arc::new(SinkQueue::new(sink.to_string(), Arc::clone(&self.states.changed)));
                    start_thread(sink, &settings, &queue);
                    (sink.clone(), queue)
                },
                |index| before.swap_remove(index),
            ));
        }
        for (_, queue) in &before {
            queue.close();
        }
        self.states.set(self.running.iter().map(|(_, queue)| Arc::clone(queue)).collect());
        self.settings = settings;
    }

    pub(super) fn states(&self) -> SinkStates {
        self.states.clone()
    }

    /// Reports whether no sink is configured.
    pub(super) fn is_empty(&self) -> bool {
        self.running.is_empty()
    }

    /// Reports whether a denial without a known pod should wait for its pod.
    pub(super) fn wait_for_pods(&self) -> bool {
        self.settings.watches_pods
    }

    /// Hands a denial to all sinks. Does not block.
    pub(super) fn push(&self, denial: &Denial) {
        if self.is_empty() || !self.settings.includes(denial.event.verdict) {
            return;
        }
        self.push_record(SinkRecord::new(denial, &self.settings));
    }

    /// Hands a request to all sinks. Does not block.
    pub(super) fn push_request(&self, event: &RequestEvent, pod: Option<&PodRef>) {
        if !self.is_empty() && self.settings.includes(event.outcome.verdict() as u8) {
            self.push_record(SinkRecord::of_request(event, pod, &self.settings));
        }
    }

    fn push_record(&self, record: SinkRecord) {
        let record = Arc::new(record);
        for (_, queue) in &self.running {
            queue.push(&record);
        }
    }

    /// Returns the CPU time that the sinks used since the last call.
    pub(super) fn take_cpu_time(&self) -> Duration {
        self.running.iter().map(|(_, queue)| queue.take_cpu_time()).sum()
    }
}

impl Drop for Sinks {
    /// Waits at most [`FLUSH_TIMEOUT`] until the sinks have written their queues.
    fn drop(&mut self) {
        let deadline = Instant::now() + FLUSH_TIMEOUT;
        for (_, queue) in &self.running {
            queue.close();
        }
        for (_, queue) in &self.running {
            if !queue.wait_end(deadline) {
                log::warn!(
                    "sink {}: the last records were not written within {FLUSH_TIMEOUT:?}",
                    queue.name()
                );
            }
        }
    }
}

fn start_thread(sink: &Sink, settings: &SinkSettings, queue: &Arc<SinkQueue>) {
    let output = Output::new(sink, settings);
    let of_thread = Arc::clone(queue);
    let thread = thread::Builder::new().name("imds-sink".to_owned());
    if let Err(error) = thread.spawn(move || run(output, &of_thread)) {
        let error = io_failed("start the thread of", &queue.name())(error);
        queue.record_result(&Sent::until(0, error), Duration::ZERO);
        queue.end(0);
    }
}

/// Writes the records of the queue until it is closed.
fn run(mut output: Output, queue: &SinkQueue) {
    let mut backoff = Backoff::new(FIRST_DELAY, MAX_DELAY);
    let mut cpu_time = thread_cpu_time();
    let mut batch = Vec::new();
    loop {
        if batch.is_empty() {
            match queue.next_batch(output.linger()) {
                Some(next) => batch = next,
                None => break,
            }
        }
        let sent = output.send(&batch);
        batch.drain(..sent.done.min(batch.len()));
        let now = thread_cpu_time();
        queue.record_result(&sent, now.saturating_sub(cpu_time));
        cpu_time = now;
        if sent.done > 0 {
            backoff.reset();
        }
        if let Some(Failure::Retry { after, .. }) = sent.failure
            && !queue.pause(backoff.next_delay(after))
        {
            break;
        }
    }
    queue.end(batch.len());
}

/// Receiver of batches.
enum Output {
    Stdout(StdoutSink),
    File(LogFileSink),
    Syslog(SyslogSink),
    Otlp(Box<OtlpSink>),
}

impl Output {
    fn new(sink: &Sink, settings: &SinkSettings) -> Self {
        match sink {
            Sink::Stdout => Self::Stdout(StdoutSink::default()),
            Sink::File(file) => Self::File(LogFileSink::new(file.clone())),
            Sink::Syslog(address) => Self::Syslog(SyslogSink::new(address.clone(), &settings.hostname)),
            Sink::Otlp(otlp) => Self::Otlp(Box::new(OtlpSink::new((**otlp).clone(), settings))),
        }
    }

    /// Returns the time to wait for a full batch.
    fn linger(&self) -> Duration {
        match self {
            Self::Stdout(_) | Self::File(_) | Self::Syslog(_) => Duration::ZERO,
            Self::Otlp(_) => OtlpSink::LINGER,
        }
    }

    fn send(&mut self, batch: &[Arc<SinkRecord>]) -> Sent {
        match self {
            Self::Stdout(sink) => sink.send(batch),
            Self::File(sink) => sink.send(batch),
            Self::Syslog(sink) => sink.send(batch),
            Self::Otlp(sink) => sink.send(batch),
        }
    }
}
