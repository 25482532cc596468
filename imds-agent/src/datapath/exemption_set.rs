//! The exemptions that the datapath should have, by identity and endpoint.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use imds_ebpf_common::{ExemptionKey, ExemptionRecord, Subject, SubjectKind, Verdict};

use crate::{
    encode::address_key,
    node::{interface_role, link::Link},
};

/// Exemptions that the datapath should have.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ExemptionSet {
    /// Verdicts, by subject and endpoint.
    pub entries: BTreeMap<ExemptionKey, ExemptionRecord>,
    /// Source addresses of the subjects.
    pub sources: BTreeSet<ExemptionKey>,
}

impl ExemptionSet {
    /// Adds the entries and sources of `others`.
    pub fn extend(&mut self, others: Self) {
        self.entries.extend(others.entries);
        self.sources.extend(others.sources);
    }

    /// Marks the entries of pods behind a bridge, whose packets name the bridge as their ingress interface at `node_egress`,
    /// and adds entries for marked packets of these bridges.
    ///
    /// A bridge with a netkit port gets none: such a pod may set the mark itself (`scrub none`).
    pub fn add_bridges(&mut self, links: &BTreeMap<u32, Link>) {
        let mut bridge_entries = BTreeMap::new();
        for (exemption, record) in &mut self.entries {
            let Some(link) = ifindex_of(exemption.subject).and_then(|index| links.get(&index)) else {
                continue;
            };
            for bridge in interface_role::ingress_devices(link, links) {
                record.flags = ExemptionRecord::MARK;
                let subject = Subject::new(SubjectKind::Bridge, bridge.into());
                let bridge_entry =
                    bridge_entries.entry(ExemptionKey { subject, ..*exemption }).or_insert(*record);
                if record.verdict == Verdict::Exempt as u32 {
                    *bridge_entry = *record;
                }
            }
        }
        self.entries.extend(bridge_entries);
    }

    /// Adds the node's own addresses: if `from_pod` is off, masqueraded packets are recognized by them.
    pub fn add_node_addresses(&mut self, addresses: impl IntoIterator<Item = IpAddr>) {
        let subject = Subject::new(SubjectKind::Interface, 0);
        let sources =
            addresses.into_iter().map(|source| ExemptionKey { address: address_key(source), subject });
        self.sources.extend(sources);
    }
}

/// Returns the ifindex of a subject that is an interface.
fn ifindex_of(subject: Subject) -> Option<u32> {
    let is_interface = SubjectKind::from_u64(subject.kind) == Some(SubjectKind::Interface);
    u32::try_from(subject.id).ok().filter(|_| is_interface)
}
