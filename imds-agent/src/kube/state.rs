//! How the watch is doing, for status and metrics.

use std::collections::BTreeMap;

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
            relists: 0,
            events: 0,
            errors: BTreeMap::new(),
        }
    }

    pub(super) fn set_connected(&mut self, connected: bool) {
        if self.connected != connected {
            (self.connected, self.since) = (connected, Timestamp::now());
        }
    }

    pub(super) fn fail(&mut self, kind: ErrorKind, message: String) {
        self.set_connected(false);
        *self.errors.entry(kind).or_default() += 1;
        self.last_error = Some(Failure { time: Timestamp::now(), kind, message });
    }
}
