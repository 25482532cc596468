//! Backoff of repairs that another program keeps reverting.

use std::time::{Duration, Instant};

/// Shortest time between two repairs.
const MIN_DELAY: Duration = Duration::from_secs(1);
/// Longest time between two repairs.
const MAX_DELAY: Duration = Duration::from_mins(5);
/// Time without a repair after which the next one starts at the shortest delay again.
const RESET_AFTER: Duration = Duration::from_mins(10);

/// Exponential backoff. The first repair is due at once, and each repair doubles the delay before the next one.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct CgroupBackoff {
    last: Option<(Instant, Duration)>,
}

impl CgroupBackoff {
    /// Reports whether a repair may be made now.
    pub(crate) fn is_due(&self, now: Instant) -> bool {
        self.last.is_none_or(|(at, delay)| now.duration_since(at) >= delay)
    }

    /// Records a repair at the time `now`.
    pub(crate) fn record_attempt(&mut self, now: Instant) {
        let delay = self.last.map_or(MIN_DELAY, |(_, delay)| (delay * 2).min(MAX_DELAY));
        self.last = Some((now, delay));
    }

    /// Resets the state if the last repair is long ago. Returns `true` if no state is left.
    pub(crate) fn reset_if_idle(&mut self, now: Instant) -> bool {
        self.last = self.last.filter(|(at, _)| now.duration_since(*at) < RESET_AFTER);
        self.last.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_up_to_minutes() {
        let mut backoff = CgroupBackoff::default();
        let mut now = Instant::now();
        let mut delays = Vec::new();
        for _ in 0..12 {
            assert!(backoff.is_due(now));
            backoff.record_attempt(now);
            let delay =
                (0..=300).map(Duration::from_secs).find(|&delay| backoff.is_due(now + delay)).unwrap();
            delays.push(delay.as_secs());
            now += delay;
        }
        assert_eq!(delays, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300]);
        assert!(!backoff.reset_if_idle(now));
        assert!(backoff.reset_if_idle(now + RESET_AFTER) && backoff.is_due(now));
    }
}
