//! Links of the node and their roles, as last read from the kernel.

use std::collections::BTreeMap;

use crate::node::{
    interface_role::{EndpointRoutes, Uplinks},
    link::Link,
    userspace_ovs,
};

/// Links of the node and their roles, as last read.
#[derive(Debug, Default)]
pub(super) struct ObservedNode {
    pub(super) links: BTreeMap<u32, Link>,
    pub(super) routes: EndpointRoutes,
    pub(super) uplinks: Uplinks,
    /// Last error of each interface, so that an error is logged once and not with every resync.
    pub(super) errors: BTreeMap<u32, String>,
}

impl ObservedNode {
    /// Recomputes the uplinks. Returns the links whose role or hooks may have changed.
    pub(super) fn update_uplinks(&mut self) -> Vec<Link> {
        let uplinks = Uplinks::new(&self.routes, self.links.values());
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

    /// Reports whether each interface has its programs, and these see the packets of every pod.
    pub(super) fn is_enforced(&self) -> bool {
        self.errors.is_empty() && userspace_ovs::find(self.links.values()).is_none()
    }

    /// Reports whether the link is an uplink that is no pod's. A port of an uplink may be a pod's, unless both ends of the
    /// pair are in the node's network namespace.
    pub(super) fn is_exit(&self, link: &Link) -> bool {
        let is_of_node = !link.may_be_pod() || link.is_internal_pair();
        self.uplinks.are_routed(link.index) || (is_of_node && self.uplinks.contain(link.index))
    }
}
