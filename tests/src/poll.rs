//! Waiting for something without guessing how long it takes.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

const INTERVAL: Duration = Duration::from_millis(10);

/// Calls `probe` until it returns something; panics with `what` when `deadline` has passed.
#[track_caller]
pub fn poll_until<T>(deadline: Duration, what: &str, probe: impl FnMut() -> Option<T>) -> T {
    match try_poll(deadline, probe) {
        Some(found) => found,
        None => panic!("waited {deadline:?} in vain for {what}"),
    }
}

/// Calls `probe` until it returns something, at least once; `None` when `deadline` has passed.
pub fn try_poll<T>(deadline: Duration, mut probe: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + deadline;
    loop {
        if let Some(found) = probe() {
            return Some(found);
        }
        if Instant::now() >= end {
            return None;
        }
        sleep(INTERVAL);
    }
}
