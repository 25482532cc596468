//! Open vSwitch with a datapath in userspace.

use super::link::{Link, LinkKind};

/// Name of the local port of the datapath that `ovs-vswitchd` opens for bridges with `datapath_type=netdev`.
const LOCAL_PORT: &str = "ovs-netdev";
/// Effect of such a datapath, for `status` and `doctor`.
pub(crate) const PROBLEM: &str = "Open vSwitch forwards packets in userspace (datapath type netdev): from_pod does not see \
                                  the packets that it forwards, and node_egress takes them for the node's";
/// Remedy of [`PROBLEM`].
pub(crate) const REMEDY: &str = "pods at its ports are not denied, except for calls that the socket hook denies: set \
                                 datapath_type=system for bridges with pods";

/// Returns the local port of a userspace datapath among the node's `links`, if there is one. The daemon reads frames of
/// other ports with packet sockets, before TC ingress, and sends them with packet sockets of the node.
pub(crate) fn find<'l>(links: impl IntoIterator<Item = &'l Link>) -> Option<&'l Link> {
    links.into_iter().find(|link| link.kind == LinkKind::Tun && link.name == LOCAL_PORT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_port_is_a_tap_device() {
        let named = |name: &str, kind| Link { name: name.to_owned(), kind, ..Link::with_index(7) };
        assert!(find(&[named("tun0", LinkKind::Tun), named(LOCAL_PORT, LinkKind::Tun)]).is_some());
        assert!(find(&[named("tun0", LinkKind::Tun), named(LOCAL_PORT, LinkKind::Veth)]).is_none());
    }
}
