//! Links of the node and their roles, as last read from the kernel.

use std::collections::{BTreeMap, BTreeSet};

use imds_ebpf_common::TcHook;

use crate::node::{interface_role::Uplinks, link::Link};

/// Links of the node and their roles, as last read.
#[derive(Debug, Default)]
pub(super) struct ObservedNode {
    pub(super) links: BTreeMap<u32, Link>,
    /// Interfaces that routes to protected endpoints name.
    pub(super) routed: BTreeSet<u32>,
    pub(super) uplinks: Uplinks,
    /// Last error of each interface, so that an error is logged once and not with every resync.
    pub(super) errors: BTreeMap<u32, String>,
}

impl ObservedNode {
    /// Recomputes the uplinks. Returns the links whose role or hooks may have changed.
    pub(super) fn update_uplinks(&mut self) -> Vec<Link> {
        let uplinks = Uplinks::new(self.routed.clone(), self.links.values());
        if uplinks == self.uplinks {
            return Vec::new();
        }
        let before = std::mem::replace(&mut self.uplinks, uplinks);
        let is_changed = |link: &&Link| {
            before.contain(link.index) != self.uplinks.contain(link.index)
                || before.are_routed(link.index) != self.uplinks.are_routed(link.index)
        };
        self.links.values().filter(is_changed).cloned().collect()
    }

    /// Reports whether `node_egress` on the link is only a precaution: no route to an endpoint uses the link yet.
    pub(super) fn is_optional(&self, link: &Link, hook: TcHook) -> bool {
        hook == TcHook::NodeEgress && link.leads_elsewhere() && !self.uplinks.contain(link.index)
    }
}
