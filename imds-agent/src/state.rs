//! What an interface is to the guard: a pure function of what the kernel and the operator say.

use std::collections::BTreeSet;

use imds_ebpf_common::Role;

use crate::{
    config::Interfaces,
    node::links::{Kind, Link},
};

/// The role of `link` on a node whose uplinks have the interface indices `uplinks`.
///
/// The operator's word comes first, except on loopback, which can't be guarded without cutting off the node. What the
/// operator excludes is [`Role::Excluded`] only where it would otherwise be guarded.
#[must_use]
pub fn role(link: &Link, uplinks: &BTreeSet<u32>, interfaces: &Interfaces) -> Role {
    if link.kind == Kind::Loopback {
        return Role::Loopback;
    }
    let role = if interfaces.includes(&link.name) { Role::Pod } else { classify(link, uplinks) };
    if role == Role::Pod && interfaces.excludes(&link.name) { Role::Excluded } else { role }
}

fn classify(link: &Link, uplinks: &BTreeSet<u32>) -> Role {
    if uplinks.contains(&link.index) {
        return Role::Uplink;
    }
    match link.kind {
        // A pair with both ends in the node's namespace has no namespace id and is no pod's.
        Kind::Veth | Kind::Netkit if link.peer_netns.is_some() => Role::Pod,
        Kind::Unreadable => Role::Pod,
        Kind::Bridge => Role::Bridge,
        Kind::Veth
        | Kind::Netkit
        | Kind::NetkitPeer
        | Kind::Bond
        | Kind::Team
        | Kind::Vlan
        | Kind::Macvlan
        | Kind::Ipvlan
        | Kind::Vrf
        | Kind::Ifb
        | Kind::Ovs
        | Kind::Loopback
        | Kind::Other => Role::Other,
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::Config;

    fn link(name: &str, kind: Kind, peer_netns: Option<i32>) -> Link {
        Link { kind, peer_netns, ..Link::unreadable(7, name.to_owned()) }
    }

    fn with_config(link: &Link, uplinks: &[u32], config: &str) -> Role {
        let config = Config::parse(config, Path::new("test")).unwrap();
        role(link, &uplinks.iter().copied().collect(), &config.interfaces)
    }

    #[test]
    fn a_veth_whose_peer_is_elsewhere_is_a_pods() {
        for kind in [Kind::Veth, Kind::Netkit] {
            assert_eq!(with_config(&link("v", kind, Some(0)), &[], ""), Role::Pod);
            assert_eq!(with_config(&link("v", kind, None), &[], ""), Role::Other);
        }
    }

    #[test]
    fn the_nodes_own_way_out_is_not_a_pods() {
        assert_eq!(with_config(&link("eth0", Kind::Veth, Some(0)), &[7], ""), Role::Uplink);
        assert_eq!(with_config(&link("eth0", Kind::Other, None), &[7], ""), Role::Uplink);
        assert_eq!(with_config(&link("br0", Kind::Bridge, None), &[7], ""), Role::Uplink);
    }

    #[test]
    fn the_rest() {
        assert_eq!(with_config(&link("lo", Kind::Loopback, None), &[], ""), Role::Loopback);
        assert_eq!(with_config(&link("cni0", Kind::Bridge, None), &[], ""), Role::Bridge);
        assert_eq!(with_config(&link("tun0", Kind::Other, None), &[], ""), Role::Other);
        assert_eq!(with_config(&link("x", Kind::Unreadable, None), &[], ""), Role::Pod);
    }

    #[test]
    fn the_operators_word_comes_first() {
        let include = "[interfaces]\ninclude = ['tun*', 'lo']";
        assert_eq!(with_config(&link("tun0", Kind::Other, None), &[], include), Role::Pod);
        assert_eq!(with_config(&link("tun0", Kind::Other, None), &[7], include), Role::Pod);
        assert_eq!(with_config(&link("lo", Kind::Loopback, None), &[], include), Role::Loopback);

        let exclude = "[interfaces]\nexclude = ['v*', 'eth0']";
        assert_eq!(with_config(&link("v0", Kind::Veth, Some(3)), &[], exclude), Role::Excluded);
        assert_eq!(with_config(&link("v0", Kind::Veth, None), &[], exclude), Role::Other);
        assert_eq!(with_config(&link("eth0", Kind::Other, None), &[7], exclude), Role::Uplink);

        let both = "[interfaces]\ninclude = ['*']\nexclude = ['v0']";
        assert_eq!(with_config(&link("v0", Kind::Veth, Some(3)), &[], both), Role::Excluded);
    }
}
