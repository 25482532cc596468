//! Debounce of changes to the configuration file.

use std::{future, time::Duration};

use tokio::time::{Instant, sleep_until};

/// Time without a change before the file is read, because programs replace a file in several steps.
const DEBOUNCE: Duration = Duration::from_millis(20);
/// Longest delay if changes do not stop.
const DEBOUNCE_MAX: Duration = Duration::from_millis(500);

/// Time at which a changed file is read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Debounce {
    at: Instant,
    latest: Instant,
}

impl Debounce {
    pub(crate) fn now() -> Self {
        let now = Instant::now();
        Self { at: now, latest: now }
    }

    /// Postpones the time after one more change, up to [`DEBOUNCE_MAX`] after the first one.
    pub(crate) fn after(before: Option<Self>) -> Self {
        let now = Instant::now();
        let latest = before.map_or(now + DEBOUNCE_MAX, |before| before.latest);
        Self { at: latest.min(now + DEBOUNCE), latest }
    }
}

/// Waits until `due`, or forever if it is `None`.
pub(crate) async fn wait_for(due: Option<Debounce>) {
    match due {
        Some(due) => sleep_until(due.at).await,
        None => future::pending().await,
    }
}
