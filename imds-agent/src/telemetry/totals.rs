//! Monotonic sums of denials. The sums of the records can decrease, because old records are removed.

use std::collections::BTreeSet;

use imds_ebpf_common::event_log::DenialKey;

use crate::{
    datapath::maps::counters::Count,
    telemetry::metrics::{DenialTo, Denied},
};

/// Maximum number of namespaces with sums of their own. Further ones share the empty name.
const MAX_NAMESPACES: usize = 1000;

/// Monotonic sums of denials by namespace, endpoint, hook and verdict.
#[derive(Debug, Default)]
pub(crate) struct Totals {
    denied: Denied,
    /// Denials that were counted without a namespace, before their records became those of a pod.
    merged: Denied,
    namespaces: BTreeSet<String>,
}

impl Totals {
    /// Counts denials of a pod in `namespace`, which is empty if no pod is known.
    pub(super) fn add(&mut self, namespace: &str, key: &DenialKey, count: Count) {
        let namespace = self.name(namespace);
        *self.denied.entry((namespace, DenialTo::from(key))).or_default() += count;
    }

    /// Records that `count` denials without a known pod became denials of a pod in `namespace`. They stay in the sum that
    /// counted them, because sums must not decrease.
    pub(super) fn record_merge(&mut self, namespace: &str, key: &DenialKey, count: Count) {
        let namespace = self.name(namespace);
        *self.merged.entry((namespace, DenialTo::from(key))).or_default() += count;
    }

    /// Raises each sum to that of the records, to which another process may have added.
    pub(super) fn raise_to(&mut self, recorded: &Denied) {
        for ((namespace, to), &count) in recorded {
            let namespace = self.name(namespace);
            let merged = self.merged.get(&(namespace.clone(), *to)).copied().unwrap_or_default();
            let total = self.denied.entry((namespace, *to)).or_default();
            total.packets = total.packets.max(count.packets.saturating_sub(merged.packets));
            total.bytes = total.bytes.max(count.bytes.saturating_sub(merged.bytes));
        }
    }

    pub(super) fn denied(&self) -> &Denied {
        &self.denied
    }

    fn name(&mut self, namespace: &str) -> String {
        let is_named = self.namespaces.contains(namespace)
            || self.namespaces.len() < MAX_NAMESPACES && self.namespaces.insert(namespace.to_owned());
        if is_named { namespace.to_owned() } else { String::new() }
    }
}

#[cfg(test)]
mod tests {
    use imds_ebpf_common::{Address, Hook, IMDS_IPV4, Verdict};

    use super::*;

    const KEY: DenialKey = DenialKey {
        address: Address::from_ipv4(IMDS_IPV4),
        sender: 0,
        hook: Hook::FromPod as u32,
        verdict: Verdict::Denied as u32,
    };

    fn count(packets: u64) -> Count {
        Count { packets, bytes: 0 }
    }

    #[test]
    fn sums_never_decrease() {
        let mut totals = Totals::default();
        totals.add("shop", &KEY, count(5));
        let sum = |totals: &Totals| totals.denied().values().map(|count| count.packets).sum::<u64>();
        totals.raise_to(&[(("shop".to_owned(), DenialTo::from(&KEY)), count(3))].into());
        assert_eq!(sum(&totals), 5);
        totals.raise_to(&[(("shop".to_owned(), DenialTo::from(&KEY)), count(7))].into());
        assert_eq!(sum(&totals), 7);
    }

    #[test]
    fn merged_records_are_counted_once() {
        let mut totals = Totals::default();
        totals.add("", &KEY, count(5));
        totals.add("shop", &KEY, count(1));
        totals.record_merge("shop", &KEY, count(5));
        let recorded = |packets| Denied::from([(("shop".to_owned(), DenialTo::from(&KEY)), count(packets))]);
        let sum = |totals: &Totals| totals.denied().values().map(|count| count.packets).sum::<u64>();
        totals.raise_to(&recorded(6));
        assert_eq!(sum(&totals), 6);
        totals.raise_to(&recorded(8));
        assert_eq!(sum(&totals), 8);
    }

    #[test]
    fn number_of_namespaces_is_limited() {
        let mut totals = Totals::default();
        for number in 0..2 * MAX_NAMESPACES {
            totals.add(&format!("namespace-{number}"), &KEY, count(1));
        }
        assert_eq!(totals.denied().len(), MAX_NAMESPACES + 1);
        let sum: u64 = totals.denied().values().map(|count| count.packets).sum();
        assert_eq!(sum, 2 * MAX_NAMESPACES as u64);
    }
}
