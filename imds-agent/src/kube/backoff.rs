//! Exponential backoff with jitter for requests to the API server.

use std::{
    hash::{BuildHasher as _, Hasher as _, RandomState},
    time::Duration,
};

/// Bounds of the pauses between attempts. Each pause is up to twice as long as the one before.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Backoff {
    /// Upper bound of the first pause.
    pub first: Duration,
    /// Upper bound of all pauses.
    pub longest: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { first: Duration::from_secs(1), longest: Duration::from_mins(1) }
    }
}

/// Counter of attempts that failed in a row.
#[derive(Debug)]
pub struct Attempts {
    backoff: Backoff,
    failed: u32,
}

impl Attempts {
    /// Creates a counter without failed attempts.
    pub fn new(backoff: Backoff) -> Self {
        Self { backoff, failed: 0 }
    }

    /// Records a success: the next pause is as short as the first.
    pub fn succeeded(&mut self) {
        self.failed = 0;
    }

    /// Records a failed attempt. Returns the pause before the next one, which is at least `asked`, the pause that the
    /// server requests.
    pub fn failed(&mut self, asked: Option<Duration>) -> Duration {
        let limit = self.backoff.first.saturating_mul(1_u32.checked_shl(self.failed).unwrap_or(u32::MAX));
        self.failed = self.failed.saturating_add(1);
        let limit = limit.min(self.backoff.longest);
        // All nodes of a cluster lose the server at the same moment. The jitter keeps them from reconnecting at the
        // same moment.
        let pause = limit / 2 + limit.mul_f64(random_fraction() / 2.0);
        asked.map_or(pause, |asked| asked + pause)
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
    fn pauses_grow_to_the_limit_and_start_over() {
        let backoff = Backoff { first: Duration::from_secs(1), longest: Duration::from_secs(10) };
        let mut attempts = Attempts::new(backoff);
        for limit in [1, 2, 4, 8, 10, 10].map(Duration::from_secs) {
            let pause = attempts.failed(None);
            assert!(pause >= limit / 2 && pause <= limit, "{pause:?} of {limit:?}");
        }
        for _ in 0..100 {
            assert!(attempts.failed(None) <= backoff.longest);
        }
        attempts.succeeded();
        assert!(attempts.failed(None) <= backoff.first);
        assert!(attempts.failed(Some(Duration::from_secs(30))) >= Duration::from_secs(31));
    }

    #[test]
    fn nodes_do_not_retry_together() {
        let pause = || Attempts::new(Backoff::default()).failed(None);
        let first = pause();
        assert!((0..10).any(|_| pause() != first));
    }
}
