//! How the watch is doing, for status and metrics.

use std::{collections::BTreeMap, time::Duration};

use jiff::Timestamp;
use serde::Serialize;

use super::api::ErrorKind;

/// How the watch is doing. In its JSON form, fields are only added.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct WatchState {
    /// Whether the API server is telling of pods now.
    pub connected: bool,
    /// Since when that is so.
    pub since: Timestamp,
    /// When what is known was last known to be all there is.
    pub last_sync: Option<Timestamp>,
    /// What failed last.
    pub last_error: Option<Failure>,
    /// When it is tried again, where it has failed.
    pub next_attempt: Option<Timestamp>,
    /// How often all pods were read, the first time included.
    pub relists: u64,
    /// How many changes to pods were told.
    pub events: u64,
    /// How often what failed.
    pub errors: BTreeMap<ErrorKind, u64>,
}

/// Something that failed.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Failure {
    /// When.
    pub time: Timestamp,
    /// What it was, for programs.
    pub kind: ErrorKind,
    /// What it was, for people.
    pub message: String,
}

impl WatchState {
    pub(super) fn new() -> Self {
        Self {
            connected: false,
            since: Timestamp::now(),
            last_sync: None,
            last_error: None,
            next_attempt: None,
            relists: 0,
            events: 0,
            errors: BTreeMap::new(),
        }
    }

    pub(super) fn connect(&mut self) {
        self.next_attempt = None;
        self.set_connected(true);
    }

    pub(super) fn fail(&mut self, kind: ErrorKind, message: String, pause: Duration) {
        let time = Timestamp::now();
        self.set_connected(false);
        *self.errors.entry(kind).or_default() += 1;
        self.last_error = Some(Failure { time, kind, message });
        self.next_attempt = time.checked_add(pause).ok();
    }

    fn set_connected(&mut self, connected: bool) {
        if self.connected != connected {
            (self.connected, self.since) = (connected, Timestamp::now());
        }
    }
}
