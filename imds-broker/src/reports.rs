//! Messages about requests, at a limited rate for each listener.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use imds_broker::protocol::{FromBroker, Outcome, Request};

use crate::{control::Control, limits::RateLimiter};

/// Longest method and path of a message.
const MAX_METHOD: usize = 16;
const MAX_PATH: usize = 256;

/// Sends the messages of one listener. Never waits: a message that the limit or a full socket suppresses is counted.
#[derive(Debug)]
pub(crate) struct Reporter {
    id: u32,
    control: Arc<Control>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    limiter: RateLimiter,
    /// Suppressed messages by outcome.
    suppressed: [u64; 3],
}

/// Request that has ended.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) imds_version: Option<u8>,
    pub(crate) outcome: Outcome,
    pub(crate) status: u16,
    pub(crate) reason: String,
}

impl Reporter {
    pub(crate) fn new(id: u32, control: Arc<Control>) -> Self {
        let limiter = RateLimiter::for_messages(Instant::now());
        Self { id, control, state: Mutex::new(State { limiter, suppressed: [0; 3] }) }
    }

    /// Reports a request.
    pub(crate) fn send(&self, report: Report) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let outcome = report.outcome;
        let suppressed = state.suppressed[outcome as usize];
        let is_allowed = state.limiter.allow(Instant::now()).is_ok();
        let is_sent = is_allowed && self.control.try_send(&self.message(report, suppressed)).is_ok();
        state.suppressed[outcome as usize] = if is_sent { 0 } else { suppressed + 1 };
    }

    fn message(&self, report: Report, suppressed: u64) -> FromBroker {
        let Report { mut method, mut path, imds_version, outcome, status, reason } = report;
        // Both are ASCII, so that each index is a boundary of characters.
        method.truncate(MAX_METHOD);
        path.truncate(MAX_PATH);
        FromBroker::Request(Request {
            id: self.id,
            method,
            path,
            imds_version,
            outcome,
            status,
            reason,
            suppressed,
        })
    }
}
