//! State of a watch, for status and metrics.

use std::{collections::BTreeMap, time::Duration};

use jiff::Timestamp;
use serde::Serialize;

use super::api_error::ErrorKind;

/// State of a watch. The JSON form only ever gains fields.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
pub struct WatchState {
    /// True while the API server answers the watch.
    pub connected: bool,
    /// Time of the last change of `connected`.
    pub since: Timestamp,
    /// Time of the last moment at which the set of objects was known to be complete.
    pub last_sync: Option<Timestamp>,
    /// Last error of the watch.
    pub last_error: Option<Failure>,
    /// Time of the next attempt, after an error.
    pub next_attempt: Option<Timestamp>,
    /// Number of complete lists, including the first one.
    pub relists: u64,
    /// Number of events about objects.
    pub events: u64,
    /// Number of errors by kind.
    pub errors: BTreeMap<ErrorKind, u64>,
}

/// Error of a watch.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Failure {
    /// Time at which the error occurred.
    pub time: Timestamp,
    /// Kind of the error, for metrics.
    pub kind: ErrorKind,
    /// Text of the error, for people.
    pub message: String,
}

impl WatchState {
    pub(super) fn new() -> Self {
        Self { since: Timestamp::now(), ..Self::default() }
    }

    pub(super) fn connect(&mut self) {
        self.next_attempt = None;
        self.set_connected(true);
    }

    pub(super) fn fail(&mut self, kind: ErrorKind, message: String, delay: Duration) {
        let time = Timestamp::now();
        self.set_connected(false);
        *self.errors.entry(kind).or_default() += 1;
        self.last_error = Some(Failure { time, kind, message });
        self.next_attempt = time.checked_add(delay).ok();
    }

    fn set_connected(&mut self, connected: bool) {
        if self.connected != connected {
            (self.connected, self.since) = (connected, Timestamp::now());
        }
    }
}
