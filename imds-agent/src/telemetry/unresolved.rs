//! Denial records whose pod is not known yet, with the identities by which the pod may become known.

use std::collections::HashMap;

use imds_ebpf_common::{
    Subject,
    event_log::{DENIALS, DenialKey},
};

/// Events that share a record.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Sharing {
    /// All events are of one pod.
    OnePod,
    /// The events may be of several pods. All of them were noted.
    NotedEvents,
    /// The events may be of several pods. Some were not noted, as those before a restart of the agent.
    UnknownEvents,
}

/// Identities of senders by the key of their record. Has at most as many entries as the map of records.
#[derive(Debug, Default)]
pub(super) struct Unresolved(HashMap<DenialKey, Vec<Subject>>);

impl Unresolved {
    /// Records the identities in an event of the record `key`. Unless `sharing` is [`Sharing::OnePod`], events of several pods
    /// may share the record, as behind a bridge: only identities that all events have in common identify its sender then.
    pub(super) fn record(&mut self, key: DenialKey, identities: Vec<Subject>, sharing: Sharing) {
        if let Some(known) = self.0.get_mut(&key) {
            if sharing == Sharing::OnePod {
                *known = identities;
            } else {
                known.retain(|identity| identities.contains(identity));
            }
        } else if !self.is_full() {
            let is_identified = sharing != Sharing::UnknownEvents;
            self.0.insert(key, if is_identified { identities } else { Vec::new() });
        }
    }

    /// Reports whether [`Unresolved::record`] ignores further keys.
    pub(super) fn is_full(&self) -> bool {
        self.0.len() >= DENIALS
    }

    pub(super) fn retain(&mut self, is_kept: impl Fn(&DenialKey) -> bool) {
        self.0.retain(|key, _| is_kept(key));
    }

    /// Removes and returns the keys for which `resolve` knows one of the identities, with that identity.
    pub(super) fn take_resolved<P>(
        &mut self,
        resolve: impl Fn(Subject) -> Option<P>,
    ) -> Vec<(DenialKey, Subject, P)> {
        let resolve = |identities: &Vec<Subject>| {
            identities.iter().find_map(|&identity| Some((identity, resolve(identity)?)))
        };
        let resolved: Vec<_> = self
            .0
            .iter()
            .filter_map(|(key, identities)| resolve(identities).map(|(identity, pod)| (*key, identity, pod)))
            .collect();
        for (key, ..) in &resolved {
            self.0.remove(key);
        }
        resolved
    }
}

#[cfg(test)]
mod tests {
    use imds_ebpf_common::{Address, IMDS_IPV4, SubjectKind};

    use super::*;

    fn key(sender: u64) -> DenialKey {
        DenialKey { address: Address::from_ipv4(IMDS_IPV4), sender, hook: 0, verdict: 0 }
    }

    const fn netns(id: u64) -> Subject {
        Subject::new(SubjectKind::Netns, id)
    }

    const fn interface(id: u64) -> Subject {
        Subject::new(SubjectKind::Interface, id)
    }

    fn known(identity: Subject) -> Option<&'static str> {
        [(netns(1), "a"), (netns(2), "b")].into_iter().find_map(|(of, pod)| (of == identity).then_some(pod))
    }

    #[test]
    fn record_of_several_pods_is_not_resolved() {
        let mut unresolved = Unresolved::default();
        for id in [1, 2] {
            unresolved.record(key(0), vec![netns(id), interface(7)], Sharing::NotedEvents);
            unresolved.record(key(id), vec![netns(id), interface(7)], Sharing::NotedEvents);
        }
        unresolved.record(key(3), vec![netns(9)], Sharing::OnePod);
        unresolved.record(key(3), vec![netns(1)], Sharing::OnePod);
        let mut resolved = unresolved.take_resolved(known);
        resolved.sort();
        assert_eq!(resolved, [(key(1), netns(1), "a"), (key(2), netns(2), "b"), (key(3), netns(1), "a")]);
        assert!(unresolved.take_resolved(known).is_empty());
        assert_eq!(
            unresolved.take_resolved(|identity| (identity == interface(7)).then_some("c")),
            [(key(0), interface(7), "c")]
        );
    }

    #[test]
    fn record_of_an_earlier_agent_is_unresolved() {
        let mut unresolved = Unresolved::default();
        for sharing in [Sharing::UnknownEvents, Sharing::NotedEvents] {
            unresolved.record(key(0), vec![netns(1)], sharing);
        }
        assert!(unresolved.take_resolved(known).is_empty());
    }

    #[test]
    fn number_of_keys_is_limited() {
        let mut unresolved = Unresolved::default();
        for sender in 0..2 * DENIALS as u64 {
            unresolved.record(key(sender), vec![netns(1)], Sharing::NotedEvents);
        }
        assert!(unresolved.is_full());
        unresolved.retain(|key| key.sender < 3);
        assert!(!unresolved.is_full());
        assert_eq!(unresolved.take_resolved(known).len(), 3);
    }
}
