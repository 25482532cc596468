//! The exemptions that the datapath should have, by identity and endpoint.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use imds_ebpf_common::{Exemption, Grant, Subject, SubjectKind, Verdict};

use crate::{
    config::endpoint_set::address,
    node::{interface_role, link::Link},
};

/// Exemptions that the datapath should have.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Grants {
    /// Verdicts, by subject and endpoint.
    pub entries: BTreeMap<Exemption, Grant>,
    /// Source addresses of the subjects.
    pub sources: BTreeSet<Exemption>,
}

impl Grants {
    /// Adds the grants and sources of `others`.
    pub fn extend(&mut self, others: Self) {
        self.entries.extend(others.entries);
        self.sources.extend(others.sources);
    }

    /// Marks the grants of pods behind a bridge, whose packets name the bridge as their ingress interface at `node_egress`,
    /// and adds grants for marked packets of these bridges.
    ///
    /// A bridge with a netkit port gets none: such a pod may set the mark itself (`scrub none`).
    pub fn add_bridges(&mut self, links: &BTreeMap<u32, Link>) {
        let mut of_bridges = BTreeMap::new();
        for (exemption, grant) in &mut self.entries {
            let Some(link) = interface_of(exemption.subject).and_then(|index| links.get(&index)) else {
                continue;
            };
            for bridge in interface_role::ingress_devices(link, links) {
                grant.flags = Grant::MARK;
                let subject = Subject::new(SubjectKind::Bridge, bridge.into());
                let of_bridge = of_bridges.entry(Exemption { subject, ..*exemption }).or_insert(*grant);
                if grant.verdict == Verdict::Exempt as u32 {
                    *of_bridge = *grant;
                }
            }
        }
        self.entries.extend(of_bridges);
    }

    /// Adds the node's own addresses: if `from_pod` is off, masqueraded packets are recognized by them.
    pub fn add_node(&mut self, addresses: impl IntoIterator<Item = IpAddr>) {
        let subject = Subject::new(SubjectKind::Interface, 0);
        let sources = addresses.into_iter().map(|source| Exemption { address: address(source), subject });
        self.sources.extend(sources);
    }
}

/// Returns the ifindex of a subject that is an interface.
fn interface_of(subject: Subject) -> Option<u32> {
    let is_interface = SubjectKind::from_u64(subject.kind) == Some(SubjectKind::Interface);
    u32::try_from(subject.id).ok().filter(|_| is_interface)
}
