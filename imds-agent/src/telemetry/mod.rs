//! The telemetry thread: collects events, and serves metrics and health.
//!
//! Pods control the number of events, and clients the number of requests. A separate thread keeps this work from delaying the
//! reconciler, which attaches the programs to new pods.

pub(crate) mod agent_stats;
mod audit_rules;
mod budget;
mod cgroup_units;
mod collector;
mod denial;
pub mod denial_report;
mod event_reader;
pub mod event_record;
pub mod http_request;
mod http_server;
pub(crate) mod logging;
pub(crate) mod metrics;
pub(crate) mod pod_events;
mod proposed_rules;
mod request_reader;
mod request_recorder;
pub(crate) mod request_report;
mod request_rules;
pub mod request_start;
mod request_starts;
pub mod sinks;
pub(crate) mod status;
pub(crate) mod subscriber;
pub(crate) mod systemd;
pub(crate) mod top;
mod totals;
mod unresolved;

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{SyncSender, sync_channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow};
use tokio::{
    runtime::Builder,
    sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
    time::{MissedTickBehavior, interval},
};

pub(crate) use self::collector::{Collected, Collector, CollectorError};
use self::{
    event_reader::EventReader,
    http_request::RequestEvent,
    http_server::Server,
    pod_events::DeniedPods,
    sinks::{SinkSettings, SinkStates, Sinks},
    totals::Totals,
};
use crate::{
    config::Listen, datapath::pin::dir::PinDir, node::netlink::Netlink, telemetry::agent_stats::AgentStats,
};

/// Handle of the telemetry thread. Dropping it ends the thread.
pub struct Telemetry {
    requests: Option<UnboundedSender<Request>>,
    progress: Arc<Mutex<Progress>>,
    denied_pods: Arc<DeniedPods>,
    sinks: SinkStates,
    thread: Option<JoinHandle<()>>,
}

enum Request {
    /// Replaces the addresses of the HTTP server.
    Listen(Vec<Listen>),
    /// Replaces the sinks and the names in their records.
    ConfigureSinks(Box<SinkSettings>),
    /// Merges the records of senders whose pods the map of pod names has now.
    MergeResolved,
    /// Records requests that the broker answered.
    RecordRequests(Vec<RequestEvent>),
    /// Closes all BPF maps for `imds-agent unload`, and acknowledges it.
    CloseMaps(SyncSender<()>),
}

/// Progress of the reconciler, as the HTTP server reports it.
struct Progress {
    stats: AgentStats,
    reported: Instant,
}

impl Telemetry {
    /// Starts the thread for the agent of the pin directory `pins`, which reports its progress at least once in `period`.
    pub fn start(pins: PinDir, period: Duration, settings: SinkSettings) -> anyhow::Result<Self> {
        let (requests, inbox) = unbounded_channel();
        let progress =
            Arc::new(Mutex::new(Progress { stats: AgentStats::default(), reported: Instant::now() }));
        let denied_pods = Arc::<DeniedPods>::default();
        let shared = (Arc::clone(&progress), Arc::clone(&denied_pods));
        let (started, result) = sync_channel(1);
        let sinks = SinkStates::default();
        let states = sinks.clone();
        let set_up = move || {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            let sinks = Sinks::start(settings, states);
            let worker = runtime.block_on(async { Worker::new(pins, shared, sinks, period) })?;
            anyhow::Ok((runtime, worker))
        };
        // The constructor waits for one message.
        let run = move || match set_up() {
            Ok((runtime, worker)) => {
                let _received = started.send(Ok(()));
                drop(started);
                runtime.block_on(worker.run(inbox));
            }
            Err(error) => drop(started.send(Err(error))),
        };
        let thread = thread::Builder::new().name("imds-telemetry".to_owned()).spawn(run);
        let thread = thread.context("failed to start the telemetry thread")?;
        result.recv().context("the telemetry thread ended")?.context("failed to start telemetry")?;
        Ok(Self { requests: Some(requests), progress, denied_pods, sinks, thread: Some(thread) })
    }

    /// Returns the denials of pods, which become Kubernetes Events.
    pub fn denied_pods(&self) -> &Arc<DeniedPods> {
        &self.denied_pods
    }

    /// Replaces the addresses at which metrics and health are served.
    pub fn listen(&self, addresses: &[Listen]) {
        self.send(Request::Listen(addresses.to_owned()));
    }

    /// Replaces the sinks.
    pub fn configure_sinks(&self, settings: SinkSettings) {
        self.send(Request::ConfigureSinks(Box::new(settings)));
    }

    /// Waits until the error of a sink changes, or other sinks are configured. Cancel safe.
    pub async fn sinks_changed(&self) {
        self.sinks.changed().await;
    }

    /// Returns the name and the error of each failing sink.
    pub fn failing_sinks(&self) -> Vec<(String, String)> {
        let queues = self.sinks.queues();
        queues.iter().filter_map(|queue| Some((queue.name().to_owned(), queue.error()?))).collect()
    }

    /// Records that the reconciler is alive, with its counters.
    pub fn report_progress(&self, stats: AgentStats) {
        let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        let has_new_names = progress.stats.map_updates.pods != stats.map_updates.pods;
        *progress = Progress { stats, reported: Instant::now() };
        drop(progress);
        if has_new_names {
            self.send(Request::MergeResolved);
        }
    }

    /// Records requests that the broker answered, and hands them to the sinks. The broker limits their number.
    pub fn record_requests(&self, requests: Vec<RequestEvent>) {
        if !requests.is_empty() {
            self.send(Request::RecordRequests(requests));
        }
    }

    /// Closes the BPF maps and stops collecting events. Metrics and health are still served.
    pub fn close_maps(&self) {
        let (closed, wait) = sync_channel(1);
        self.send(Request::CloseMaps(closed));
        // An error means that the thread has ended, which closed its descriptors.
        let _ended = wait.recv();
    }

    /// Waits until the thread has ended, which it does only if it panics.
    pub async fn ended(&self) -> anyhow::Error {
        if let Some(requests) = &self.requests {
            requests.closed().await;
        }
        anyhow!("the telemetry thread ended: see the previous log lines")
    }

    fn send(&self, request: Request) {
        if let Some(requests) = &self.requests {
            // An error means that the thread has ended, which `ended` reports.
            let _ended = requests.send(request);
        }
    }
}

impl Drop for Telemetry {
    /// Ends the thread, which removes its Unix sockets.
    fn drop(&mut self) {
        self.requests = None;
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

struct Worker {
    events: EventReader,
    server: Server,
    /// Retry interval of failed operations.
    period: Duration,
}

/// Counters of the events, as the HTTP server reports them.
#[derive(Default)]
struct EventStats {
    /// Events that this process has read; `None` while another process reads them.
    collected: Cell<Option<Collected>>,
    totals: Rc<RefCell<Totals>>,
    denied_pods: Arc<DeniedPods>,
    sinks: SinkStates,
}

impl Worker {
    fn new(
        pins: PinDir,
        (progress, denied_pods): (Arc<Mutex<Progress>>, Arc<DeniedPods>),
        sinks: Sinks,
        period: Duration,
    ) -> anyhow::Result<Self> {
        let sink_states = sinks.states();
        let stats = Rc::new(EventStats { denied_pods, sinks: sink_states, ..EventStats::default() });
        let server = Server::new(pins.clone(), Netlink::connect()?, progress, Rc::clone(&stats), period);
        Ok(Self { events: EventReader::new(pins, stats, sinks), server, period })
    }

    async fn run(mut self, mut requests: UnboundedReceiver<Request>) {
        let mut retry = interval(self.period);
        retry.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                request = requests.recv() => match request {
                    Some(Request::Listen(addresses)) => self.server.listen(&addresses),
                    Some(Request::ConfigureSinks(settings)) => self.events.configure_sinks(*settings),
                    Some(Request::MergeResolved) => self.events.merge_resolved(),
                    Some(Request::RecordRequests(requests)) => self.events.record_requests(&requests),
                    Some(Request::CloseMaps(closed)) => {
                        self.events.close();
                        // The agent waits for this message.
                        let _received = closed.send(());
                    }
                    None => return,
                },
                () = self.events.collect() => {}
                never = self.server.run_until_idle() => match never {},
                _ = retry.tick() => {
                    self.server.retry();
                    self.events.open();
                }
            }
        }
    }
}
