//! Bounded queue between the telemetry thread and the thread of a sink, with the counters of the sink.

use std::{
    collections::VecDeque,
    mem,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::Notify;

use super::{
    sink_error::{Failure, Sent},
    sink_record::SinkRecord,
};
use crate::{causes::with_causes, escape::escape};

pub(super) const MAX_RECORDS: usize = 4096;
const MAX_BYTES: usize = 4 << 20;
/// Maximum number of records that a sink writes at once.
pub(super) const MAX_BATCH: usize = 512;

/// Records that a sink has not written yet. A full queue drops new records.
#[derive(Debug)]
pub(crate) struct SinkQueue {
    /// Type and target of the sink.
    name: String,
    state: Mutex<State>,
    /// Notified when records arrive, when the queue is closed and when its thread has ended.
    wake: Condvar,
    /// Notified when the error of the sink changes.
    changed: Arc<Notify>,
}

#[derive(Debug, Default)]
struct State {
    records: VecDeque<Arc<SinkRecord>>,
    bytes: usize,
    counts: SinkCounts,
    /// Error of the last attempt.
    error: Option<String>,
    /// True from the first dropped record until the queue is empty.
    is_overflowing: bool,
    is_closed: bool,
    has_ended: bool,
    /// CPU time of the thread that is not charged yet.
    cpu_time: Duration,
}

/// Numbers of records since the sink was configured.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct SinkCounts {
    pub written: u64,
    /// Records for which the queue had no room, or that were not written before the end.
    pub dropped: u64,
    /// Records that the receiver did not accept.
    pub failed: u64,
}

impl SinkQueue {
    pub(super) fn new(name: String, changed: Arc<Notify>) -> Self {
        Self { name, state: Mutex::default(), wake: Condvar::new(), changed }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn counts(&self) -> SinkCounts {
        self.lock().counts
    }

    /// Returns the error of the last attempt, or `None` if it succeeded.
    pub(crate) fn error(&self) -> Option<String> {
        self.lock().error.clone()
    }

    /// Returns the CPU time that the thread used since the last call.
    pub(super) fn take_cpu_time(&self) -> Duration {
        mem::take(&mut self.lock().cpu_time)
    }

    /// Adds a record, or drops it if there is no room.
    pub(super) fn push(&self, record: &Arc<SinkRecord>) {
        let mut state = self.lock();
        let bytes = state.bytes + record.size();
        if state.records.len() < MAX_RECORDS && bytes <= MAX_BYTES {
            state.bytes = bytes;
            state.records.push_back(Arc::clone(record));
            self.wake.notify_all();
            return;
        }
        state.counts.dropped += 1;
        if !mem::replace(&mut state.is_overflowing, true) {
            drop(state);
            log::warn!("sink {}: dropping records, because the queue is full", self.name);
        }
    }

    /// Waits for records, and for up to `linger` for a full batch. Returns `None` once the queue is closed and empty.
    pub(super) fn next_batch(&self, linger: Duration) -> Option<Vec<Arc<SinkRecord>>> {
        let idle = |state: &mut State| state.records.is_empty() && !state.is_closed;
        let mut state = self.wake.wait_while(self.lock(), idle).unwrap_or_else(PoisonError::into_inner);
        if !linger.is_zero() {
            let is_incomplete = |state: &mut State| state.records.len() < MAX_BATCH && !state.is_closed;
            let waited = self.wake.wait_timeout_while(state, linger, is_incomplete);
            (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
        let count = state.records.len().min(MAX_BATCH);
        let batch: Vec<_> = state.records.drain(..count).collect();
        state.bytes -= batch.iter().map(|record| record.size()).sum::<usize>();
        if state.records.is_empty() && mem::take(&mut state.is_overflowing) {
            let dropped = state.counts.dropped;
            drop(state);
            log::info!("sink {}: the queue has room again; {dropped} records were dropped so far", self.name);
        }
        (!batch.is_empty()).then_some(batch)
    }

    /// Records the result of an attempt, and logs a change of the state of the sink.
    pub(super) fn record_result(&self, sent: &Sent, cpu_time: Duration) {
        let error = sent.failure.as_ref().map(|failure| match failure {
            Failure::Retry { error, .. } | Failure::Rejected(error) => {
                escape(&with_causes(error)).into_owned()
            }
        });
        let mut state = self.lock();
        state.cpu_time += cpu_time;
        state.counts.written += sent.done.saturating_sub(sent.failed) as u64;
        state.counts.failed += sent.failed as u64;
        if state.error == error {
            return;
        }
        let was_failing = state.error.is_some();
        state.error.clone_from(&error);
        drop(state);
        self.changed.notify_one();
        if was_failing == error.is_some() {
            return;
        }
        match (error, &sent.failure) {
            (Some(error), Some(Failure::Rejected(_))) => {
                log::error!("sink {}: records were rejected and are lost: {error}", self.name);
            }
            (Some(error), _) => log::error!("sink {}: failed to write records, retrying: {error}", self.name),
            (None, _) => log::info!("sink {}: writing records again", self.name),
        }
    }

    /// Waits for `delay`. Returns false once the queue is closed.
    pub(super) fn pause(&self, delay: Duration) -> bool {
        let waited = self.wake.wait_timeout_while(self.lock(), delay, |state| !state.is_closed);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        !state.is_closed
    }

    /// Ends the thread of the sink once it has written the records in the queue, or failed to.
    pub(super) fn close(&self) {
        self.lock().is_closed = true;
        self.wake.notify_all();
    }

    /// Records that the thread has ended and left this number of records unwritten.
    pub(super) fn end(&self, unwritten: usize) {
        let mut state = self.lock();
        state.counts.dropped += (unwritten + state.records.len()) as u64;
        state.records.clear();
        state.has_ended = true;
        self.wake.notify_all();
    }

    /// Waits until the thread has ended. Returns false after `deadline`.
    pub(super) fn wait_end(&self, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        let waited = self.wake.wait_timeout_while(self.lock(), left, |state| !state.has_ended);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.has_ended
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
