//! Polling with a time limit.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use crate::scale::scaled_timeout;

/// First and further pauses between probes. Probes can be processes, which take CPU time from the awaited event.
const INTERVALS: [Duration; 2] = [Duration::from_millis(5), Duration::from_millis(100)];

/// Calls `probe` until it returns a value. Panics with `what` after `deadline`, which is longer on emulated machines.
#[track_caller]
pub fn poll_until<T>(deadline: Duration, what: &str, probe: impl FnMut() -> Option<T>) -> T {
    let deadline = scaled_timeout(deadline);
    match try_poll(deadline, probe) {
        Some(found) => found,
        None => panic!("timed out after {deadline:?} waiting for {what}"),
    }
}

/// Calls `probe` until it returns a value, at least once. Returns `None` after `deadline`.
pub fn try_poll<T>(deadline: Duration, mut probe: impl FnMut() -> Option<T>) -> Option<T> {
    let (start, [shortest, longest]) = (Instant::now(), INTERVALS);
    loop {
        if let Some(found) = probe() {
            return Some(found);
        }
        let waited = start.elapsed();
        if waited >= deadline {
            return None;
        }
        sleep((waited / 4).clamp(shortest, longest));
    }
}
