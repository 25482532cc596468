//! The telemetry thread: collects events, and serves metrics and health.
//!
//! Pods control the number of events, and clients the number of requests. A separate thread keeps this work from delaying the
//! reconciler, which attaches the programs to new pods.

pub(crate) mod agent_stats;
mod budget;
mod cgroup_units;
mod collector;
pub mod denial_report;
pub mod event_record;
mod http_server;
pub(crate) mod logging;
pub(crate) mod metrics;
pub(crate) mod pod_events;
pub(crate) mod status;
pub(crate) mod subscriber;
pub(crate) mod systemd;
pub(crate) mod top;
mod totals;
mod unresolved;

use std::{
    cell::{Cell, RefCell},
    future, io,
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
    io::unix::AsyncFd,
    runtime::Builder,
    sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
    time::{MissedTickBehavior, interval, sleep_until},
};

pub(crate) use self::collector::{Collected, Collector, CollectorError};
use self::{
    budget::{CpuBudget, thread_cpu_time},
    http_server::Server,
    pod_events::DeniedPods,
    totals::Totals,
};
use crate::{
    config::Listen,
    datapath::{object, pin::dir::PinDir},
    node::netlink::Netlink,
    telemetry::agent_stats::AgentStats,
};

/// Pause between two reads of events, so that a flood does not wake the thread for each event.
const DEBOUNCE: Duration = Duration::from_millis(50);

/// Handle of the telemetry thread. Dropping it ends the thread.
pub struct Telemetry {
    requests: Option<UnboundedSender<Request>>,
    progress: Arc<Mutex<Progress>>,
    denied_pods: Arc<DeniedPods>,
    thread: Option<JoinHandle<()>>,
}

enum Request {
    /// Replaces the addresses of the HTTP server.
    Listen(Vec<Listen>),
    /// Merges the records of senders whose pods the map of pod names has now.
    MergeResolved,
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
    pub fn start(pins: PinDir, period: Duration) -> anyhow::Result<Self> {
        let (requests, inbox) = unbounded_channel();
        let progress =
            Arc::new(Mutex::new(Progress { stats: AgentStats::default(), reported: Instant::now() }));
        let denied_pods = Arc::<DeniedPods>::default();
        let shared = (Arc::clone(&progress), Arc::clone(&denied_pods));
        let (started, result) = sync_channel(1);
        let set_up = move || {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            let worker = runtime.block_on(async { Worker::new(pins, shared, period) })?;
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
        Ok(Self { requests: Some(requests), progress, denied_pods, thread: Some(thread) })
    }

    /// Returns the denials of pods, which become Kubernetes Events.
    pub fn denied_pods(&self) -> &Arc<DeniedPods> {
        &self.denied_pods
    }

    /// Replaces the addresses at which metrics and health are served.
    pub fn listen(&self, addresses: &[Listen]) {
        self.send(Request::Listen(addresses.to_owned()));
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

/// Collects events while no other process does.
struct EventReader {
    pins: PinDir,
    collector: Option<AsyncFd<Collector>>,
    stats: Rc<EventStats>,
    budget: CpuBudget,
    next: Instant,
    /// True once `imds-agent unload` has closed the maps.
    is_closed: bool,
}

/// Counters of the events, as the HTTP server reports them.
#[derive(Default)]
struct EventStats {
    /// Events that this process has read; `None` while another process reads them.
    collected: Cell<Option<Collected>>,
    totals: Rc<RefCell<Totals>>,
    denied_pods: Arc<DeniedPods>,
}

impl Worker {
    fn new(
        pins: PinDir,
        (progress, denied_pods): (Arc<Mutex<Progress>>, Arc<DeniedPods>),
        period: Duration,
    ) -> anyhow::Result<Self> {
        let stats = Rc::new(EventStats { denied_pods, ..EventStats::default() });
        let server = Server::new(pins.clone(), Netlink::connect()?, progress, Rc::clone(&stats), period);
        Ok(Self { events: EventReader::new(pins, stats), server, period })
    }

    async fn run(mut self, mut requests: UnboundedReceiver<Request>) {
        let mut retry = interval(self.period);
        retry.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                request = requests.recv() => match request {
                    Some(Request::Listen(addresses)) => self.server.listen(&addresses),
                    Some(Request::MergeResolved) => self.events.merge_resolved(),
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

impl EventReader {
    fn new(pins: PinDir, stats: Rc<EventStats>) -> Self {
        let budget = CpuBudget::new(Instant::now());
        Self { pins, collector: None, stats, budget, next: Instant::now(), is_closed: false }
    }

    /// Starts collecting events, unless another process does.
    fn open(&mut self) {
        // Without a bpffs, the agent pins no map.
        if self.is_closed || self.collector.is_some() || !object::is_loaded(&self.pins) {
            return;
        }
        match self.try_open() {
            Ok(collector) => {
                self.stats.collected.set(collector.as_ref().map(|collector| collector.get_ref().collected()));
                self.collector = collector;
            }
            Err(error) => self.fail(&error),
        }
    }

    fn try_open(&self) -> anyhow::Result<Option<AsyncFd<Collector>>> {
        let Some(collector) = Collector::open(&self.pins)? else { return Ok(None) };
        // The process that collected events until now added to the records.
        self.stats.totals.borrow_mut().raise_to(&collector.recorded()?);
        let collector = collector
            .with_totals(Rc::clone(&self.stats.totals))
            .with_denied_pods(Arc::clone(&self.stats.denied_pods));
        // SAFETY: the descriptor is that of the ring buffer, which the collector owns and never replaces.
        Ok(Some(unsafe { AsyncFd::register(collector) }.map_err(io::Error::from)?))
    }

    /// Waits for events and for the CPU budget, then reads some events.
    async fn collect(&mut self) {
        if let Err(error) = self.try_collect().await {
            self.fail(&error);
        }
    }

    async fn try_collect(&mut self) -> anyhow::Result<()> {
        let Some(collector) = &mut self.collector else { return future::pending().await };
        sleep_until(self.next.max(self.budget.available_at()).into()).await;
        if !collector.get_ref().has_more() {
            // Clear readiness before the read, so that an event that arrives during the read sets it again.
            collector.readable_mut().await?.clear_ready();
        }
        let spent = thread_cpu_time();
        collector.get_mut().collect()?;
        self.budget.spend(thread_cpu_time().saturating_sub(spent), Instant::now());
        self.stats.collected.set(Some(collector.get_ref().collected()));
        self.next = Instant::now() + DEBOUNCE;
        Ok(())
    }

    /// Merges the records of senders whose pods became known. Counts against the CPU budget of later reads.
    fn merge_resolved(&mut self) {
        let Some(collector) = &mut self.collector else { return };
        let spent = thread_cpu_time();
        let merged = collector.get_mut().merge_resolved();
        self.budget.spend(thread_cpu_time().saturating_sub(spent), Instant::now());
        if let Err(error) = merged {
            self.fail(&error.into());
        }
    }

    fn fail(&mut self, error: &anyhow::Error) {
        log::error!("failed to read events of the BPF programs, retrying at the next resync: {error:#}");
        self.release();
    }

    fn close(&mut self) {
        self.is_closed = true;
        self.release();
    }

    fn release(&mut self) {
        self.collector = None;
        self.stats.collected.set(None);
    }
}
