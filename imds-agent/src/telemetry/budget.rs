//! Limits the CPU time of work whose amount pods control.

use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};

/// CPU time that is added per second: 2 % of one CPU.
const PER_SECOND: Duration = Duration::from_millis(20);
/// Maximum unused CPU time, for bursts.
const BURST: Duration = Duration::from_millis(400);

/// Token bucket of CPU time.
#[derive(Debug)]
pub(super) struct CpuBudget {
    /// Unused time, up to [`BURST`].
    credit: Duration,
    /// Time used in excess of the credit.
    debt: Duration,
    updated: Instant,
}

impl CpuBudget {
    pub(super) fn new(now: Instant) -> Self {
        Self { credit: BURST, debt: Duration::ZERO, updated: now }
    }

    /// Records work that took this much CPU time and ended `now`.
    pub(super) fn spend(&mut self, used: Duration, now: Instant) {
        let granted = now.saturating_duration_since(self.updated).mul_f64(PER_SECOND.as_secs_f64());
        self.updated = now;
        let credit = (self.credit + granted.saturating_sub(self.debt)).min(BURST);
        let used = used + self.debt.saturating_sub(granted);
        (self.credit, self.debt) = (credit.saturating_sub(used), used.saturating_sub(credit));
    }

    /// Returns the time from which on more work is allowed.
    pub(super) fn available_at(&self) -> Instant {
        self.updated + self.debt.div_f64(PER_SECOND.as_secs_f64())
    }
}

/// Returns the CPU time of the calling thread; zero on an error, which Linux does not return for this clock.
pub(super) fn thread_cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map(Duration::from).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn burst_then_steady_rate() {
        let start = Instant::now();
        let mut budget = CpuBudget::new(start);
        budget.spend(BURST, start);
        assert_eq!(budget.available_at(), start);
        budget.spend(PER_SECOND * 3, start);
        assert_eq!(budget.available_at(), start + Duration::from_secs(3));
        let later = start + Duration::from_secs(2);
        budget.spend(PER_SECOND, later);
        assert_eq!(budget.available_at(), later + Duration::from_secs(2));
    }

    #[test]
    fn credit_is_limited() {
        let start = Instant::now();
        let mut budget = CpuBudget::new(start);
        let later = start + Duration::from_hours(1);
        budget.spend(BURST + PER_SECOND, later);
        assert_eq!(budget.available_at(), later + Duration::from_secs(1));
    }
}
