//! Counters of packets and bytes by interface, hook and verdict, summed over the CPUs.

use std::{collections::BTreeMap, ops::AddAssign};

use aya::{
    maps::{MapError, PerCpuValues},
    util::nr_cpus,
};
use imds_ebpf_common::{
    Counter, CounterKey, Hook, Verdict,
    event::{MAX_RATE_LIMITERS, RateLimiter},
    names::MAP_COUNTERS,
};
use serde::Serialize;

use crate::datapath::{
    DatapathError, map_error,
    object::{self, Maps},
};

/// Flag `BPF_NOEXIST`: creates an entry, and fails if it exists.
const NOEXIST: u64 = 1;

/// Number of packets and bytes with one verdict.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize)]
pub struct Count {
    /// Number of packets or calls; a GSO packet counts once.
    pub packets: u64,
    /// Number of bytes, including the link-layer header.
    pub bytes: u64,
}

impl AddAssign for Count {
    fn add_assign(&mut self, other: Self) {
        self.packets = self.packets.saturating_add(other.packets);
        self.bytes = self.bytes.saturating_add(other.bytes);
    }
}

/// Counts of one interface and hook by verdict.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize)]
pub struct Counts {
    /// Denied because the mode is enforce.
    pub denied: Count,
    /// Passed because the mode is audit.
    pub audited: Count,
    /// Passed because the mode is off or the port is allowed.
    pub allowed: Count,
    /// Passed because the sender is exempt.
    pub exempt: Count,
    /// Connections that were redirected to the listener of a scoped exemption.
    pub redirected: Count,
}

impl Counts {
    fn get_mut(&mut self, verdict: u8) -> Option<&mut Count> {
        Verdict::COUNTED.into_iter().find(|&counted| counted as u8 == verdict).and_then(|verdict| {
            match verdict {
                Verdict::Denied => Some(&mut self.denied),
                Verdict::Audited => Some(&mut self.audited),
                Verdict::Off | Verdict::Allowed => Some(&mut self.allowed),
                Verdict::Exempt => Some(&mut self.exempt),
                Verdict::Redirected => Some(&mut self.redirected),
                Verdict::Unrelated => None,
            }
        })
    }

    /// Returns each count with the name of its verdict.
    pub fn named(self) -> [(&'static str, Count); 5] {
        let Self { denied, audited, allowed, exempt, redirected } = self;
        [
            ("denied", denied),
            ("audited", audited),
            ("allowed", allowed),
            ("exempt", exempt),
            ("redirected", redirected),
        ]
    }
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.denied += other.denied;
        self.audited += other.audited;
        self.allowed += other.allowed;
        self.exempt += other.exempt;
        self.redirected += other.redirected;
    }
}

/// Reads all counts by interface index and number of the hook. Counts of deleted interfaces and of cgroup hooks have the index
/// [`CounterKey::DELETED`].
pub fn read(maps: &Maps) -> Result<BTreeMap<(u32, u8), Counts>, MapError> {
    let mut counts: BTreeMap<(u32, u8), Counts> = BTreeMap::new();
    for entry in object::present(maps.counters.iter()) {
        let (key, values) = entry?;
        if let Some(count) = counts.entry((key.ifindex, key.hook)).or_default().get_mut(key.verdict) {
            let Counter { packets, bytes, .. } = sum(&values);
            *count += Count { packets, bytes };
        }
    }
    Ok(counts)
}

/// Creates the counters of an interface. If that fails, the programs create them for the first packet.
pub(crate) fn create(maps: &mut Maps, ifindex: u32, hook: Hook) {
    for verdict in Verdict::COUNTED {
        let zero = on_first_cpu(Counter::default());
        let key = CounterKey::new(ifindex, hook, verdict);
        if let Some(zero) = zero
            && let Err(error) = maps.counters.insert(key, zero, NOEXIST)
        {
            log::debug!("failed to create a counter of interface {ifindex}: {error}");
        }
    }
}

/// Returns the number of rate-limited events that no emitted event accounts for yet. The next event of the same source
/// includes them.
pub fn pending_events(maps: &Maps) -> Result<u64, MapError> {
    let mut pending = 0_u64;
    let of_interfaces = object::present(maps.counters.iter());
    for entry in of_interfaces {
        pending = pending.saturating_add(sum(&entry?.1).limiter.pending);
    }
    // The programs add and evict sources concurrently, and an evicted key restarts the iteration: the limit ends it.
    for entry in object::present(maps.sources.iter()).take(2 * MAX_RATE_LIMITERS) {
        for limiter in entry?.1.iter() {
            pending = pending.saturating_add(limiter.pending);
        }
    }
    Ok(pending)
}

/// Adds the counts of an interface to those of deleted interfaces, and removes its counters.
pub(crate) fn retire(maps: &mut Maps, ifindex: u32) -> Result<(), DatapathError> {
    let failed = map_error(MAP_COUNTERS);
    let keys = [Hook::FromPod, Hook::NodeEgress]
        .into_iter()
        .flat_map(|hook| Verdict::COUNTED.map(|verdict| CounterKey::new(ifindex, hook, verdict)));
    for key in keys {
        let deleted = CounterKey { ifindex: CounterKey::DELETED, ..key };
        let Ok(values) = maps.counters.get(&key, 0) else { continue };
        if values.iter().any(|counter| counter.packets != 0) {
            let before = maps.counters.get(&deleted, 0).map(|values| sum(&values)).unwrap_or_default();
            if let Some(total) = on_first_cpu(add(before, &sum(&values))) {
                maps.counters.insert(deleted, total, 0).map_err(failed)?;
            }
        }
        object::removed(maps.counters.remove(&key)).map_err(failed)?;
    }
    Ok(())
}

/// Returns the sum over all CPUs, including the number of pending events.
fn sum(values: &PerCpuValues<Counter>) -> Counter {
    values.iter().fold(Counter::default(), add)
}

fn add(sum: Counter, other: &Counter) -> Counter {
    Counter {
        packets: sum.packets.saturating_add(other.packets),
        bytes: sum.bytes.saturating_add(other.bytes),
        limiter: RateLimiter {
            pending: sum.limiter.pending.saturating_add(other.limiter.pending),
            ..sum.limiter
        },
    }
}

/// Returns a per-CPU value with `counter` on the first CPU and zeros on the others.
fn on_first_cpu(counter: Counter) -> Option<PerCpuValues<Counter>> {
    let mut values = vec![Counter::default(); nr_cpus().ok()?];
    *values.first_mut()? = counter;
    PerCpuValues::try_from(values).ok()
}
