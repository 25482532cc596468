//! Exponential backoff with jitter for requests to the API server.

use std::{
    hash::{BuildHasher as _, Hasher as _, RandomState},
    time::Duration,
};

/// Delays between attempts that fail in a row. Each delay is up to twice as long as the one before.
#[derive(Clone, Debug)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
    failed: u32,
}

impl Default for Backoff {
    fn default() -> Self {
        Self::new(Duration::from_secs(1), Duration::from_mins(1))
    }
}

impl Backoff {
    /// Creates a backoff with the upper bounds of the first delay and of all delays.
    pub fn new(first: Duration, longest: Duration) -> Self {
        Self { first, longest, failed: 0 }
    }

    /// Records a success: the next delay is as short as the first.
    pub fn reset(&mut self) {
        self.failed = 0;
    }

    /// Records a failed attempt. Returns the delay before the next one, which is at least `retry_after`, the delay that
    /// the server requests.
    pub fn next_delay(&mut self, retry_after: Option<Duration>) -> Duration {
        let limit = self.first.saturating_mul(1_u32.checked_shl(self.failed).unwrap_or(u32::MAX));
        self.failed = self.failed.saturating_add(1);
        let limit = limit.min(self.longest);
        // All nodes of a cluster lose the server at the same moment. The jitter keeps them from reconnecting at the
        // same moment.
        limit / 2 + limit.mul_f64(random_fraction() / 2.0) + retry_after.unwrap_or_default()
    }
}

/// Returns a random number from 0 to 1. The standard library seeds each hasher randomly.
fn random_fraction() -> f64 {
    let [a, b, c, d, ..] = RandomState::new().build_hasher().finish().to_ne_bytes();
    f64::from(u32::from_ne_bytes([a, b, c, d])) / f64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_grow_to_the_limit_and_start_over() {
        let longest = Duration::from_secs(10);
        let mut backoff = Backoff::new(Duration::from_secs(1), longest);
        for limit in [1, 2, 4, 8, 10, 10].map(Duration::from_secs) {
            let delay = backoff.next_delay(None);
            assert!(delay >= limit / 2 && delay <= limit, "{delay:?} of {limit:?}");
        }
        for _ in 0..100 {
            assert!(backoff.next_delay(None) <= longest);
        }
        backoff.reset();
        assert!(backoff.next_delay(None) <= Duration::from_secs(1));
        assert!(backoff.next_delay(Some(Duration::from_secs(30))) >= Duration::from_secs(31));
    }

    #[test]
    fn nodes_do_not_retry_together() {
        let delay = || Backoff::default().next_delay(None);
        let first = delay();
        assert!((0..10).any(|_| delay() != first));
    }
}
