//! Collects the events of the programs, and hands denials to the sinks.

use std::{
    future, io,
    rc::Rc,
    time::{Duration, Instant},
};

use tokio::{io::unix::AsyncFd, time::sleep_until};

use super::{
    EventStats,
    budget::{CpuBudget, thread_cpu_time},
    collector::Collector,
    denial::{Denial, WaitingDenials},
    http_request::RequestEvent,
    request_recorder::RequestRecorder,
    sinks::{SinkSettings, Sinks},
};
use crate::datapath::{maps::request_log::RequestSource, object, pin::dir::PinDir};

/// Pause between two reads of events, so that a flood does not wake the thread for each event.
const DEBOUNCE: Duration = Duration::from_millis(50);

/// Collects events while no other process does.
pub(super) struct EventReader {
    pins: PinDir,
    collector: Option<AsyncFd<Collector>>,
    stats: Rc<EventStats>,
    budget: CpuBudget,
    /// Budget of the requests that the broker answered.
    request_budget: CpuBudget,
    next: Instant,
    waiting: WaitingDenials,
    /// Recorder of the requests that the broker answered; `None` once the maps are closed.
    requests: Option<RequestRecorder>,
    sinks: Sinks,
    /// True once `imds-agent unload` has closed the maps.
    is_closed: bool,
}

impl EventReader {
    pub(super) fn new(pins: PinDir, stats: Rc<EventStats>, sinks: Sinks) -> Self {
        Self {
            requests: Some(RequestRecorder::new(pins.clone(), RequestSource::Broker)),
            pins,
            collector: None,
            stats,
            budget: CpuBudget::new(Instant::now()),
            request_budget: CpuBudget::new(Instant::now()),
            next: Instant::now(),
            waiting: WaitingDenials::default(),
            sinks,
            is_closed: false,
        }
    }

    /// Starts collecting events, unless another process does.
    pub(super) fn open(&mut self) {
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
        let collector = collector.with_totals(Rc::clone(&self.stats.totals));
        // SAFETY: the collector owns the descriptor and never replaces it.
        Ok(Some(unsafe { AsyncFd::register(collector) }.map_err(io::Error::from)?))
    }

    /// Waits for events and for the CPU budget, then reads some events.
    pub(super) async fn collect(&mut self) {
        if let Err(error) = self.try_collect().await {
            self.fail(&error);
        }
    }

    async fn try_collect(&mut self) -> anyhow::Result<()> {
        let Some(collector) = &mut self.collector else { return future::pending().await };
        let next_due = self.waiting.next_due();
        tokio::select! {
            ready = ready_to_read(collector, self.next.max(self.budget.available_at())) => ready?,
            () = sleep_until(next_due.unwrap_or_else(Instant::now).into()), if next_due.is_some() => {
                self.deliver_ready();
                return Ok(());
            }
        }
        let spent = thread_cpu_time();
        // Another thread switches Kubernetes Events on and off, also while this one waits for events.
        let has_consumers = !self.sinks.is_empty() || self.stats.denied_pods.is_enabled();
        collector.get_mut().keep_denials(has_consumers);
        collector.get_mut().collect()?;
        let denials = collector.get_mut().take_denials();
        for (event, pod) in collector.get_mut().take_requests() {
            self.sinks.push_request(&event, pod.as_ref());
        }
        self.deliver(denials);
        self.spend_since(spent);
        if let Some(collector) = &self.collector {
            self.stats.collected.set(Some(collector.get_ref().collected()));
        }
        self.next = Instant::now() + DEBOUNCE;
        Ok(())
    }

    /// Merges the records of senders whose pods became known. Counts against the CPU budget of later reads.
    pub(super) fn merge_resolved(&mut self) {
        let Some(collector) = &mut self.collector else { return };
        let spent = thread_cpu_time();
        let merged = collector.get_mut().merge_resolved();
        self.spend_since(spent);
        if let Err(error) = merged {
            self.fail(&error.into());
        }
        if let Some(Err(error)) = self.requests.as_mut().map(RequestRecorder::merge_resolved) {
            log::error!("failed to record the pods of requests: {:#}", anyhow::Error::from(error));
        }
        self.deliver_ready();
    }

    /// Records requests that the broker answered, and hands them to the sinks. Drops them while their CPU budget is used up, so
    /// that they delay no denials.
    pub(super) fn record_requests(&mut self, requests: &[RequestEvent]) {
        let Some(recorder) = &mut self.requests else { return };
        if self.request_budget.available_at() > Instant::now() {
            log::debug!("dropped {} requests of the broker: the CPU budget is used up", requests.len());
            return;
        }
        let spent = thread_cpu_time();
        for event in requests {
            let pod = recorder.record(event).unwrap_or_else(|error| {
                log::error!("failed to record a request: {:#}", anyhow::Error::from(error));
                None
            });
            self.sinks.push_request(event, pod.as_ref());
        }
        let used = thread_cpu_time().saturating_sub(spent) + self.sinks.take_cpu_time();
        self.request_budget.spend(used, Instant::now());
    }

    /// Replaces the sinks. Denials that wait for a pod get the names of the new configuration.
    pub(super) fn configure_sinks(&mut self, settings: SinkSettings) {
        self.sinks.configure(settings);
    }

    /// Hands over denials. A denial of an unknown pod waits a moment for the pod.
    fn deliver(&mut self, denials: Vec<Denial>) {
        let now = Instant::now();
        for denial in denials {
            let is_ready = denial.pod.is_some() || !self.sinks.wait_for_pods();
            let ready = if is_ready { Some(denial) } else { self.waiting.add(denial, now) };
            if let Some(denial) = ready {
                self.on_denial(&denial);
            }
        }
    }

    /// Hands over the denials whose pod became known, or that have waited long enough. Counts against the CPU budget of later
    /// reads.
    fn deliver_ready(&mut self) {
        let Some(collector) = &self.collector else { return };
        let spent = thread_cpu_time();
        let ready = self.waiting.take_ready(Instant::now(), |denial| collector.get_ref().find_pod(denial));
        for denial in &ready {
            self.on_denial(denial);
        }
        self.spend_since(spent);
    }

    /// Passes a denial to its consumers, none of which may block.
    fn on_denial(&self, denial: &Denial) {
        self.sinks.push(denial);
        self.stats.denied_pods.record(denial);
    }

    /// Charges the CPU time since `start` to the budget, with that of the sinks.
    fn spend_since(&mut self, start: Duration) {
        let own = thread_cpu_time().saturating_sub(start);
        self.budget.spend(own + self.sinks.take_cpu_time(), Instant::now());
    }

    fn fail(&mut self, error: &anyhow::Error) {
        log::error!("failed to read events of the BPF programs, retrying at the next resync: {error:#}");
        self.release();
    }

    pub(super) fn close(&mut self) {
        self.is_closed = true;
        self.requests = None;
        self.release();
    }

    fn release(&mut self) {
        for denial in self.waiting.take_all().collect::<Vec<_>>() {
            self.on_denial(&denial);
        }
        self.collector = None;
        self.stats.collected.set(None);
    }
}

/// Waits until `not_before`, and then for events.
async fn ready_to_read(collector: &mut AsyncFd<Collector>, not_before: Instant) -> io::Result<()> {
    sleep_until(not_before.into()).await;
    if !collector.get_ref().has_more() {
        // Clear readiness before the read, so that an event that arrives during the read sets it again.
        collector.readable_mut().await?.clear_ready();
    }
    Ok(())
}

impl Drop for EventReader {
    /// Hands over the denials that still wait, before the sinks end.
    fn drop(&mut self) {
        self.release();
    }
}
