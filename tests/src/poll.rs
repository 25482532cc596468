//! Waiting for something without guessing how long it takes.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use crate::effort::patience;

/// Between two probes, of which each may be a process that takes time from what is waited for.
const INTERVALS: [Duration; 2] = [Duration::from_millis(5), Duration::from_millis(100)];

/// Calls `probe` until it returns something; panics with `what` when `deadline` has passed, several times over on machines
/// that are emulated.
#[track_caller]
pub fn poll_until<T>(deadline: Duration, what: &str, probe: impl FnMut() -> Option<T>) -> T {
    let deadline = patience(deadline);
    match try_poll(deadline, probe) {
        Some(found) => found,
        None => panic!("waited {deadline:?} in vain for {what}"),
    }
}

/// Calls `probe` until it returns something, at least once; `None` when `deadline` has passed.
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
