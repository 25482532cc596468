//! Limits of each listener, which a pod exceeds only to its own harm, and of all listeners together.

use std::time::{Duration, Instant};

/// Connections of one listener at the same time. Further ones wait in the kernel's queue.
pub(crate) const MAX_CONNECTIONS: usize = 32;
/// Connections of all listeners at the same time. Each has at most about 64 KiB of memory.
pub(crate) const MAX_ALL_CONNECTIONS: usize = 1024;
/// [`MAX_CONNECTIONS`] of a listener that only explains.
pub(crate) const MAX_EXPLAINED_CONNECTIONS: usize = 8;
/// Connections of all listeners that only explain at the same time. A separate limit, so that they do not make connections of scoped
/// exemptions wait.
pub(crate) const MAX_ALL_EXPLAINED_CONNECTIONS: usize = 256;
/// Listeners at the same time. The agent has at most 1,024 active ones, and can open a successor of each before it closes them.
pub(crate) const MAX_LISTENERS: usize = 4096;
/// Time in which a client must send the head and the body of a request after its first byte, and the first byte on a new connection.
pub(crate) const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// [`REQUEST_TIMEOUT`] of a listener that only explains: slow clients of some pods must not make others wait for long.
pub(crate) const EXPLAINED_REQUEST_TIMEOUT: Duration = Duration::from_secs(1);
/// Time between two requests on a connection.
pub(crate) const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// Time in which a client must close a connection after the last response.
pub(crate) const LINGER_TIMEOUT: Duration = Duration::from_secs(1);
/// Pause after a failed accept(2), such as while the process has no free descriptors.
pub(crate) const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// Rate limiter that allows a burst and then a steady rate (generic cell rate algorithm).
#[derive(Debug)]
pub(crate) struct RateLimiter {
    interval: Duration,
    burst: u32,
    /// Time at which all earlier events are paid for.
    paid_at: Instant,
}

impl RateLimiter {
    /// Returns a limiter for the requests of a listener: 200 per second.
    pub(crate) fn for_requests(now: Instant) -> Self {
        Self::new(200, 200, now)
    }

    /// Returns a limiter for the connections of a listener: 400 per second.
    pub(crate) fn for_connections(now: Instant) -> Self {
        Self::new(400, 100, now)
    }

    /// Returns a limiter for the messages about requests of a listener: 10 per second.
    pub(crate) fn for_messages(now: Instant) -> Self {
        Self::new(10, 20, now)
    }

    fn new(per_second: u32, burst: u32, now: Instant) -> Self {
        Self { interval: Duration::from_secs(1) / per_second, burst, paid_at: now }
    }

    /// Counts an event if the limit allows it.
    ///
    /// # Errors
    ///
    /// Returns the time until the limit allows the next event.
    pub(crate) fn allow(&mut self, now: Instant) -> Result<(), Duration> {
        let paid_at = self.paid_at.max(now) + self.interval;
        let wait = paid_at.saturating_duration_since(now + self.interval * self.burst);
        if wait.is_zero() {
            self.paid_at = paid_at;
            Ok(())
        } else {
            Err(wait)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn burst_then_rate() {
        let start = Instant::now();
        let mut limiter = RateLimiter::new(10, 3, start);
        let count = |limiter: &mut RateLimiter, now| (0..100).filter(|_| limiter.allow(now).is_ok()).count();
        assert_eq!(count(&mut limiter, start), 3);
        assert_eq!(limiter.allow(start), Err(Duration::from_millis(100)));
        assert_eq!(count(&mut limiter, start + Duration::from_millis(100)), 1);
        assert_eq!(count(&mut limiter, start + Duration::from_millis(350)), 2);
        assert_eq!(count(&mut limiter, start + Duration::from_mins(1)), 3);
    }
}
