//! The exemptions that the datapath should have, by identity and endpoint.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use imds_ebpf_common::{
    ExemptionKey, ExemptionRecord, Subject, SubjectKind, Verdict,
    exemption::{NODE_SOURCES, PASSED_SOURCES},
};

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

    /// Returns the keys of the entries of network namespaces.
    pub fn netns(&self) -> impl Iterator<Item = ExemptionKey> {
        let is_netns = |key: &&ExemptionKey| key.subject.kind == SubjectKind::Netns as u64;
        self.entries.keys().filter(is_netns).copied()
    }

    /// Sets the flag [`ExemptionRecord::PASSES`] of pods behind a bridge, whose packets name the bridge as their ingress interface at
    /// `node_egress`, and adds entries and sources for packets from these bridges that `from_pod` has let pass.
    pub fn add_bridges(&mut self, links: &BTreeMap<u32, Link>) {
        let mut bridge_entries = BTreeMap::new();
        for (exemption, record) in &mut self.entries {
            let Some(link) = ifindex_of(exemption.subject).and_then(|index| links.get(&index)) else {
                continue;
            };
            for bridge in interface_role::ingress_devices(link, links) {
                record.flags = ExemptionRecord::PASSES;
                let subject = Subject::new(SubjectKind::Interface, bridge.into());
                let of_bridge = ExemptionRecord { flags: ExemptionRecord::BRIDGE, ..*record };
                let entry = bridge_entries.entry(ExemptionKey { subject, ..*exemption }).or_insert(of_bridge);
                if record.verdict == Verdict::Exempt as u32 {
                    *entry = of_bridge;
                }
            }
        }
        self.entries.extend(bridge_entries);
        let of_bridge = |source: &ExemptionKey| {
            let link = ifindex_of(source.subject).and_then(|index| links.get(&index));
            let bridges = link.map(|link| interface_role::ingress_devices(link, links)).unwrap_or_default();
            let address = source.address;
            let subject = |bridge: u32| Subject::new(SubjectKind::Interface, bridge.into());
            bridges.into_iter().map(move |bridge| ExemptionKey { address, subject: subject(bridge) })
        };
        let sources: Vec<_> = self.sources.iter().flat_map(of_bridge).collect();
        self.sources.extend(sources);
    }

    /// Adds the node's own addresses, by which masqueraded packets are recognized.
    pub fn add_node_addresses(&mut self, addresses: impl IntoIterator<Item = IpAddr>) {
        let subject = Subject::new(SubjectKind::Interface, NODE_SOURCES.into());
        let sources =
            addresses.into_iter().map(|source| ExemptionKey { address: address_key(source), subject });
        self.sources.extend(sources);
    }

    /// Adds all sources a second time for packets that pass a second `node_egress` hook ([`PASSED_SOURCES`]).
    pub fn add_passed_sources(&mut self) {
        let subject = Subject::new(SubjectKind::Interface, PASSED_SOURCES.into());
        let sources: Vec<_> = self.sources.iter().map(|source| ExemptionKey { subject, ..*source }).collect();
        self.sources.extend(sources);
    }
}

/// Returns the ifindex of a subject that is an interface.
fn ifindex_of(subject: Subject) -> Option<u32> {
    let is_interface = SubjectKind::from_u64(subject.kind) == Some(SubjectKind::Interface);
    u32::try_from(subject.id).ok().filter(|_| is_interface)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::node::link::LinkKind;

    const BRIDGE: u32 = 3;
    const PORT: u32 = 7;
    const ROUTED: u32 = 8;

    /// Returns the entries and sources of an exempt pod behind this interface.
    fn of_pod(index: u32) -> ExemptionSet {
        let subject = Subject::new(SubjectKind::Interface, index.into());
        let record = ExemptionRecord::new(Verdict::Exempt, 1);
        let source = address_key(Ipv4Addr::new(10, 244, 0, 7).into());
        ExemptionSet {
            entries: [(ExemptionKey { address: imds_ebpf_common::Address::ANY, subject }, record)].into(),
            sources: [ExemptionKey { address: source, subject }].into(),
        }
    }

    #[test]
    fn bridges_have_the_sources_of_their_exempt_pods() {
        let bridge = Link { kind: LinkKind::Bridge, ..Link::with_index(BRIDGE) };
        let port = Link { master: Some(BRIDGE), ..Link::with_index(PORT) };
        let links = [bridge, port, Link::with_index(ROUTED)].map(|link| (link.index, link)).into();
        for (index, expected) in [(PORT, vec![BRIDGE, PORT]), (ROUTED, vec![ROUTED])] {
            let mut exemptions = of_pod(index);
            exemptions.add_bridges(&links);
            let sources: Vec<_> =
                exemptions.sources.iter().filter_map(|source| ifindex_of(source.subject)).collect();
            assert_eq!(sources, expected);
        }
    }
}
