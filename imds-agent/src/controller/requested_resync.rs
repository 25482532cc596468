//! Full resyncs outside of the timer: after lost netlink events, and after a failed read of links or routes.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};

/// Shortest pause after a requested resync. Each further one doubles it.
const MIN_PAUSE: Duration = Duration::from_secs(1);
/// Longest pause after a requested resync, so that lost events can't keep the agent busy.
const MAX_PAUSE: Duration = Duration::from_secs(30);

/// Time of the next requested resync. The first one of a series runs at once.
#[derive(Debug, Default)]
pub(super) struct RequestedResync {
    due: Option<Instant>,
    /// Time from which the next requested resync may run.
    not_before: Option<Instant>,
    pause: Duration,
}

impl RequestedResync {
    /// Requests a resync. Returns the time until it runs, or `None` if one is requested already.
    pub(super) fn request(&mut self) -> Option<Duration> {
        let now = Instant::now();
        let due = self.not_before.map_or(now, |not_before| not_before.max(now));
        let is_new = self.due.is_none();
        self.due.get_or_insert(due);
        is_new.then(|| due.saturating_duration_since(now))
    }

    /// Requests a resync if `result` is an error.
    pub(super) fn request_after<T, E>(&mut self, result: Result<T, E>) -> Result<T, E> {
        result.inspect_err(|_| {
            self.request();
        })
    }

    /// Waits until the requested resync is due.
    pub(super) async fn due(&self) {
        match self.due {
            Some(due) => sleep_until(due).await,
            None => std::future::pending().await,
        }
    }

    /// Records that a full resync ended. A requested one is done with it.
    pub(super) fn end(&mut self) {
        self.due = None;
        let now = Instant::now();
        let is_series = self.not_before.is_some_and(|not_before| now < not_before + MAX_PAUSE);
        self.pause = if is_series { (self.pause * 2).min(MAX_PAUSE) } else { MIN_PAUSE };
        self.not_before = Some(now + self.pause);
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    /// Returns the number of resyncs within `period` if each is followed by another request.
    async fn repeat(requested: &mut RequestedResync, period: Duration) -> u32 {
        let (end, mut count) = (Instant::now() + period, 0);
        loop {
            requested.request();
            requested.due().await;
            if Instant::now() >= end {
                return count;
            }
            requested.end();
            count += 1;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn repeated_overruns_back_off() {
        let mut requested = RequestedResync::default();
        assert_eq!(requested.request(), Some(Duration::ZERO));
        assert_eq!(requested.request(), None);
        // At once, then after 1, 2, 4, 8, 16 s, and every 30 s.
        assert_eq!(repeat(&mut requested, Duration::from_secs(32)).await, 6);
        assert_eq!(repeat(&mut requested, Duration::from_mins(10)).await, 20);
    }

    #[tokio::test(start_paused = true)]
    async fn failed_resync_is_retried_after_a_second() {
        let mut requested = RequestedResync::default();
        requested.end();
        assert_eq!(requested.request_after(Err::<(), _>("no memory")), Err("no memory"));
        let failed = Instant::now();
        advance(MIN_PAUSE / 2).await;
        // Further requests don't postpone the first.
        assert_eq!(requested.request(), None);
        requested.due().await;
        assert_eq!(failed.elapsed(), MIN_PAUSE);
        requested.end();
        advance(2 * MAX_PAUSE + MIN_PAUSE).await;
        assert_eq!(requested.request(), Some(Duration::ZERO));
    }
}
