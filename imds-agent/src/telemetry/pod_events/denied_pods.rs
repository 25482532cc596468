//! Denials of pods, shared between the telemetry thread and the writer of Events.

use std::{
    collections::VecDeque,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use imds_ebpf_common::Subject;
use tokio::sync::Notify;

use super::event_queue::{DenialNotice, EventQueue, PendingWrite};
use crate::kube::pod_ref::PodRef;

/// Time for which a denial waits until its sender is known as a pod. The sandbox of a new pod is found within seconds.
const MAX_WAIT: Duration = Duration::from_secs(30);
/// Largest number of waiting denials. Most senders that are unknown for longer are no pods.
const MAX_WAITING: usize = 64;

/// Denials that become Events. All methods are cheap, and record nothing while no writer runs.
#[derive(Debug, Default)]
pub struct DeniedPods {
    is_enabled: AtomicBool,
    state: Mutex<State>,
    changed: Notify,
    written: AtomicU64,
    failed: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    queue: EventQueue,
    unnamed: VecDeque<UnnamedDenial>,
}

/// Denial of a sender that is not known as a pod yet.
#[derive(Debug)]
struct UnnamedDenial {
    senders: Vec<Subject>,
    notice: DenialNotice,
    since: Instant,
}

/// Counters of the writes to the API server.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct EventWrites {
    /// Events that the API server has stored or updated.
    pub written: u64,
    /// Requests that failed.
    pub failed: u64,
    /// Denied packets and calls without an Event, because of a limit or of a rejected request.
    pub dropped: u64,
}

impl DeniedPods {
    /// Starts or stops recording. Denials that were recorded before a stop are dropped.
    pub(crate) fn set_enabled(&self, is_enabled: bool) {
        self.is_enabled.store(is_enabled, Relaxed);
        if !is_enabled {
            *self.lock() = State::default();
        }
    }

    pub(crate) fn is_enabled(&self) -> bool {
        self.is_enabled.load(Relaxed)
    }

    pub(crate) fn writes(&self) -> EventWrites {
        let dropped = self.lock().queue.dropped;
        EventWrites { written: self.written.load(Relaxed), failed: self.failed.load(Relaxed), dropped }
    }

    /// Records denied requests of `pod`. If the pod is unknown, keeps them until one of `senders` is known as a pod.
    pub(crate) fn record(&self, pod: Option<PodRef>, senders: Vec<Subject>, notice: DenialNotice) {
        let now = Instant::now();
        let mut state = self.lock();
        let Some(pod) = pod else { return state.keep_unnamed(senders, notice, now) };
        state.queue.record(pod, notice, now);
        drop(state);
        self.changed.notify_one();
    }

    /// Moves the denials whose sender is known as a pod now to the queue.
    pub(crate) fn resolve(&self, pod: impl Fn(Subject) -> Option<PodRef>) {
        let now = Instant::now();
        let mut state = self.lock();
        for unnamed in std::mem::take(&mut state.unnamed) {
            match unnamed.senders.iter().find_map(|&sender| pod(sender)) {
                Some(pod) => state.queue.record(pod, unnamed.notice, now),
                None => state.unnamed.push_back(unnamed),
            }
        }
        drop(state);
        self.changed.notify_one();
    }

    /// Waits until a denial is recorded.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    pub(super) fn next_due(&self) -> Option<Instant> {
        self.lock().queue.next_due()
    }

    pub(super) fn take_due(&self) -> Option<PendingWrite> {
        self.lock().queue.take_due(Instant::now())
    }

    /// Records that the API server has stored `write` as the Event `name`.
    pub(super) fn on_written(&self, write: &PendingWrite, name: String) {
        self.written.fetch_add(1, Relaxed);
        self.lock().queue.on_written(write, name, Instant::now());
    }

    /// Records a failed write. `code` is the status code of the API server's answer. A write that a later attempt can
    /// complete stays in the queue.
    pub(super) fn on_failed(&self, write: &PendingWrite, code: Option<u16>) {
        self.failed.fetch_add(1, Relaxed);
        let queue = &mut self.lock().queue;
        match code {
            Some(404) if write.name.is_some() => queue.on_expired(write),
            // Missing role, deleted namespace, or an object that the server does not accept.
            Some(400 | 403 | 404 | 422) => queue.on_rejected(write),
            _ => queue.retry(write),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn keep_unnamed(&mut self, senders: Vec<Subject>, notice: DenialNotice, now: Instant) {
        while self.unnamed.pop_front_if(|unnamed| unnamed.since + MAX_WAIT < now).is_some() {}
        let is_equal =
            |other: &&mut UnnamedDenial| other.senders == senders && other.notice.request == notice.request;
        if let Some(known) = self.unnamed.iter_mut().find(is_equal) {
            known.notice.count = known.notice.count.saturating_add(notice.count);
        } else if self.unnamed.len() < MAX_WAITING {
            self.unnamed.push_back(UnnamedDenial { senders, notice, since: now });
        }
    }
}
