//! Denials of pods, shared between the telemetry thread and the writer of Events.

use std::{
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

use tokio::sync::Notify;

use super::event_queue::{DenialNotice, EventQueue, PendingWrite};
use crate::telemetry::denial::Denial;

/// Denials that become Events. All methods are cheap, and record nothing while no writer runs.
#[derive(Debug, Default)]
pub struct DeniedPods {
    is_enabled: AtomicBool,
    queue: Mutex<EventQueue>,
    changed: Notify,
    written: AtomicU64,
    failed: AtomicU64,
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
            *self.lock() = EventQueue::default();
        }
    }

    pub(crate) fn is_enabled(&self) -> bool {
        self.is_enabled.load(Relaxed)
    }

    pub(crate) fn writes(&self) -> EventWrites {
        let dropped = self.lock().dropped;
        EventWrites { written: self.written.load(Relaxed), failed: self.failed.load(Relaxed), dropped }
    }

    /// Records a denied request of a known pod.
    pub(crate) fn record(&self, denial: &Denial) {
        let Some(pod) = denial.pod.clone().filter(|_| self.is_enabled()) else { return };
        self.lock().record(pod, DenialNotice::new(denial), Instant::now());
        self.changed.notify_one();
    }

    /// Waits until a denial is recorded.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    pub(super) fn next_due(&self) -> Option<Instant> {
        self.lock().next_due()
    }

    pub(super) fn take_due(&self) -> Option<PendingWrite> {
        self.lock().take_due(Instant::now())
    }

    /// Records that the API server has stored `write` as the Event `name`.
    pub(super) fn on_written(&self, write: &PendingWrite, name: String) {
        self.written.fetch_add(1, Relaxed);
        self.lock().on_written(write, name, Instant::now());
    }

    /// Records a failed write. `code` is the status code of the API server's answer. A write that a later attempt can
    /// complete stays in the queue.
    pub(super) fn on_failed(&self, write: &PendingWrite, code: Option<u16>) {
        self.failed.fetch_add(1, Relaxed);
        let mut queue = self.lock();
        match code {
            Some(404) if write.name.is_some() => queue.on_expired(write),
            // Missing role, deleted namespace, or an object that the server does not accept.
            Some(400 | 403 | 404 | 422) => queue.on_rejected(write),
            // No answer, or no valid credentials: the next write would fail, too.
            None | Some(401) => queue.retry(write),
            Some(_) => queue.postpone(write, Instant::now()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, EventQueue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
