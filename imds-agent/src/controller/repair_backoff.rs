//! Backoff of repeated repairs, so that two programs that undo each other's changes do not loop.

use std::{collections::BTreeMap, time::Duration};

use tokio::time::Instant;

use crate::datapath::pin::dir::AttachPoint;

/// Repairs in a row without delay. A single interfering program causes no more than these.
const BURST: u32 = 3;
/// Delay after the last repair of the burst. Each further repair doubles it.
const MIN_DELAY: Duration = Duration::from_secs(1);
/// Upper bound of the delay between repairs of a hook that still has a program of the agent.
const MAX_DELAY: Duration = Duration::from_mins(5);
/// Upper bound of the delay if the hook has no program of the agent.
const MAX_DELAY_IF_MISSING: Duration = Duration::from_secs(10);
/// Time without a repair after which the next one starts a new burst. Longer than the longest delay plus a resync
/// interval, because only the resync requests a repair that is due.
const BURST_RESET_INTERVAL: Duration = Duration::from_mins(10);

/// Decides when a hook of an interface may be repaired: attached again, reordered, or given another program.
#[derive(Debug, Default)]
pub struct RepairBackoff {
    points: BTreeMap<AttachPoint, HookRepairs>,
    /// Number of suppressed repairs since the start.
    pub suppressed: u64,
}

/// Repairs of one hook of one interface.
#[derive(Debug)]
struct HookRepairs {
    /// Repairs in a row, without a long interval between them.
    count: u32,
    /// Time from which the next repair may run.
    next: Instant,
    /// True if a repair was suppressed since the last one that ran.
    is_waiting: bool,
}

impl RepairBackoff {
    /// Reports whether a repair of `point` may run now, and counts it as run or as suppressed.
    ///
    /// `is_missing`: the hook has no program of the agent, so the repair must not wait long.
    pub fn allow(&mut self, point: AttachPoint, is_missing: bool, now: Instant) -> bool {
        let repairs =
            self.points.entry(point).or_insert(HookRepairs { count: 0, next: now, is_waiting: false });
        if now >= repairs.next + BURST_RESET_INTERVAL {
            repairs.count = 0;
        }
        if now < repairs.next {
            repairs.is_waiting = true;
            self.suppressed += 1;
            return false;
        }
        repairs.count = repairs.count.saturating_add(1);
        let max_delay = if is_missing { MAX_DELAY_IF_MISSING } else { MAX_DELAY };
        repairs.next = now + delay(repairs.count).min(max_delay);
        repairs.is_waiting = false;
        true
    }

    /// Returns when a suppressed repair of `point` may run, or `None` if none is pending.
    pub fn next_retry(&self, point: AttachPoint) -> Option<Instant> {
        self.points.get(&point).filter(|repairs| repairs.is_waiting).map(|repairs| repairs.next)
    }

    /// Returns the suppressed repair that may run first, and its time.
    pub fn first_retry(&self) -> Option<(AttachPoint, Instant)> {
        let waiting = self.points.iter().filter(|(_, repairs)| repairs.is_waiting);
        waiting.map(|(&point, repairs)| (point, repairs.next)).min_by_key(|&(_, next)| next)
    }

    /// Drops the suppressed repair of `point`, because the hook is as desired. The delay of the next repair stays.
    pub fn clear(&mut self, point: AttachPoint) {
        if let Some(repairs) = self.points.get_mut(&point) {
            repairs.is_waiting = false;
        }
    }

    /// Removes the state of a deleted interface.
    pub fn remove_link(&mut self, ifindex: u32) {
        self.points.retain(|point, _| point.ifindex != ifindex);
    }
}

/// Returns the delay after `count` repairs in a row.
fn delay(count: u32) -> Duration {
    match count.checked_sub(BURST) {
        Some(repeated) => {
            MIN_DELAY.saturating_mul(2_u32.checked_pow(repeated).unwrap_or(u32::MAX)).min(MAX_DELAY)
        }
        None => Duration::ZERO,
    }
}

#[cfg(test)]
mod tests {
    use imds_ebpf_common::TcHook;
    use tokio::time::advance;

    use super::*;

    const POINT: AttachPoint = AttachPoint { ifindex: 7, hook: TcHook::FromPod };
    const OTHER: AttachPoint = AttachPoint { ifindex: 7, hook: TcHook::NodeEgress };

    /// Returns the number of repairs that run within `period` if another program undoes each one immediately.
    async fn fight(backoff: &mut RepairBackoff, period: Duration) -> u32 {
        let (end, mut repairs) = (Instant::now() + period, 0);
        while Instant::now() < end {
            repairs += u32::from(backoff.allow(POINT, false, Instant::now()));
            advance(Duration::from_millis(100)).await;
        }
        repairs
    }

    #[tokio::test(start_paused = true)]
    async fn first_repairs_run_at_once() {
        let mut backoff = RepairBackoff::default();
        for _ in 0..BURST {
            assert!(backoff.allow(POINT, false, Instant::now()));
        }
        assert_eq!(backoff.next_retry(POINT), None);
        assert!(!backoff.allow(POINT, false, Instant::now()));
        assert_eq!(backoff.suppressed, 1);
        assert_eq!(backoff.next_retry(POINT), Some(Instant::now() + MIN_DELAY));
        assert_eq!(backoff.first_retry(), Some((POINT, Instant::now() + MIN_DELAY)));
        advance(MIN_DELAY).await;
        assert!(backoff.allow(POINT, false, Instant::now()));
        assert_eq!(backoff.first_retry(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn repeated_repairs_back_off_to_the_limit() {
        let mut backoff = RepairBackoff::default();
        // 3 at once, then after 1, 2, 4, 8, 16, 32, 64, 128 and 256 s.
        assert_eq!(fight(&mut backoff, Duration::from_secs(512)).await, BURST + 9);
        let per_hour = fight(&mut backoff, Duration::from_hours(1)).await;
        assert!((11..=12).contains(&per_hour), "{per_hour}");
        assert!(backoff.suppressed > 1_000);
    }

    #[tokio::test(start_paused = true)]
    async fn quiet_period_resets_the_delay() {
        let mut backoff = RepairBackoff::default();
        fight(&mut backoff, Duration::from_secs(20)).await;
        let next = backoff.next_retry(POINT).unwrap();
        advance(next - Instant::now() + BURST_RESET_INTERVAL).await;
        for _ in 0..BURST {
            assert!(backoff.allow(POINT, false, Instant::now()));
        }
        assert!(!backoff.allow(POINT, false, Instant::now()));
    }

    #[tokio::test(start_paused = true)]
    async fn hooks_and_interfaces_are_independent() {
        let mut backoff = RepairBackoff::default();
        fight(&mut backoff, Duration::from_secs(20)).await;
        assert!(!backoff.allow(POINT, false, Instant::now()));
        assert!(backoff.allow(OTHER, false, Instant::now()));
        backoff.clear(POINT);
        assert_eq!(backoff.first_retry(), None);
        assert!(!backoff.allow(POINT, false, Instant::now()));
        backoff.remove_link(7);
        assert!(backoff.allow(POINT, false, Instant::now()));
    }
}
