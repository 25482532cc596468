//! Role and hooks of an interface: pure functions of kernel state and configuration.

use std::collections::{BTreeMap, BTreeSet};

use imds_ebpf_common::{Role, TcHook, TcHookSet};

use crate::{
    config::Interfaces,
    node::link::{Link, LinkKind},
};

/// Role of an interface, and the TC hooks that it should have if these are enabled.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Assignment {
    /// Role of the interface, as `status` prints it.
    pub role: Role,
    /// TC hooks that the interface should have.
    pub hooks: TcHookSet,
}

/// Interfaces that routes to protected endpoints name.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct EndpointRoutes {
    /// Interfaces of routes that lead to an endpoint.
    pub sure: BTreeSet<u32>,
    /// Interfaces of routes to all link-local addresses, for a link-local endpoint. Each interface with IPv6 has such a
    /// route, those of pods too.
    pub link_local: BTreeSet<u32>,
}

impl EndpointRoutes {
    /// Adds the interfaces of a route.
    pub(super) fn add(&mut self, is_link_local: bool, interfaces: Vec<u32>) {
        let routes = if is_link_local { &mut self.link_local } else { &mut self.sure };
        routes.extend(interfaces);
    }
}

/// Interfaces through which the node sends to protected endpoints.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Uplinks {
    /// Interfaces that a route names. The link-local route of a veth or netkit does not count, because the device may be
    /// a pod's.
    routed: BTreeSet<u32>,
    /// Interfaces below or beside those of the routes: ports of a bridge, slaves of a bond, the NIC of a VLAN.
    related: BTreeSet<u32>,
}

impl Uplinks {
    /// Computes the uplinks of a node with these `links` and `endpoint_routes`.
    ///
    /// Ports of one bridge, bond or VRF belong together, and a stacked device belongs to the one below it. All ports of
    /// Open vSwitch belong together, too, because the agent does not read its flows.
    pub fn new<'l>(
        endpoint_routes: &EndpointRoutes,
        links: impl IntoIterator<Item = &'l Link, IntoIter: Clone>,
    ) -> Self {
        let links = links.into_iter();
        let mut routed = endpoint_routes.sure.clone();
        let mut related = with_related(routed.clone(), &links);
        // Otherwise each pod would be an uplink, and each port of a bridge that only pods use.
        let of_node = links.filter(|link| !link.may_be_pod());
        let link_local =
            of_node.clone().map(|link| link.index).filter(|index| endpoint_routes.link_local.contains(index));
        routed.extend(link_local);
        related.extend(&routed);
        related = with_related(related, &of_node);
        Self { routed, related }
    }

    /// Reports whether a route to a protected endpoint names the interface.
    pub fn are_routed(&self, index: u32) -> bool {
        self.routed.contains(&index)
    }

    /// Reports whether packets of the node to a protected endpoint can leave through the interface.
    pub fn contain(&self, index: u32) -> bool {
        self.related.contains(&index)
    }

    /// Reports whether `node_egress` on the link is only a precaution: the link leads to another network namespace, and no route
    /// to an endpoint uses it yet.
    pub fn is_optional(&self, link: &Link, hook: TcHook) -> bool {
        hook == TcHook::NodeEgress && link.leads_elsewhere() && !self.contain(link.index)
    }
}

/// Adds the devices below and beside those in `related`.
fn with_related<'l>(
    mut related: BTreeSet<u32>,
    links: &(impl Iterator<Item = &'l Link> + Clone),
) -> BTreeSet<u32> {
    loop {
        let before = related.len();
        for link in links.clone() {
            if related.contains(&link.index) || link.master.is_some_and(|master| related.contains(&master)) {
                related.insert(link.index);
                related.extend(link.master);
                related.extend(link.lower);
            }
        }
        let ovs = links.clone().filter(|link| link.kind == LinkKind::Ovs).map(|link| link.index);
        if ovs.clone().any(|index| related.contains(&index)) {
            related.extend(ovs);
        }
        if related.len() == before {
            return related;
        }
    }
}

/// Returns the devices that can be the ingress interface of a packet from a port after the port's bridge has passed it
/// up: the bridge, the devices on top of it, and a VRF. For Open vSwitch these are all internal ports.
pub fn ingress_devices(port: &Link, links: &BTreeMap<u32, Link>) -> BTreeSet<u32> {
    let mut devices = BTreeSet::new();
    let master = |link: &Link| link.master.and_then(|index| links.get(&index));
    let Some(first) =
        master(port).filter(|link| matches!(link.kind, LinkKind::Bridge | LinkKind::Ovs | LinkKind::Vrf))
    else {
        return devices;
    };
    devices.insert(first.index);
    if first.kind == LinkKind::Ovs {
        devices.extend(links.values().filter(|link| link.kind == LinkKind::Ovs).map(|link| link.index));
    }
    loop {
        let before = devices.len();
        for link in links.values() {
            let is_above =
                link.lower.is_some_and(|lower| devices.contains(&lower)) && !link.leads_elsewhere();
            if is_above {
                devices.insert(link.index);
            }
            let vrf =
                master(link).filter(|master| master.kind == LinkKind::Vrf && devices.contains(&link.index));
            devices.extend(vrf.map(|vrf| vrf.index));
        }
        if devices.len() == before {
            return devices;
        }
    }
}

/// Assigns role and hooks to `link`. `is_known_pod`: Kubernetes has a pod behind the link.
///
/// The operator's configuration takes precedence, except on loopback: hooks on loopback would cut off the node itself.
///
/// A veth or netkit device whose peer is in another network namespace is either a pod's link or an uplink of the node
/// (in kind, LXD or Incus), and routes can change. Such a device gets both hooks unless it is known to be a pod's. A
/// wrong guess or a change of the role then leaves no moment without the hook.
pub fn assign(link: &Link, uplinks: &Uplinks, interfaces: &Interfaces, is_known_pod: bool) -> Assignment {
    let assignment = |role, hooks| Assignment { role, hooks };
    if link.kind == LinkKind::Loopback {
        return assignment(Role::Loopback, TcHookSet::NONE);
    }
    if interfaces.excludes(&link.name) {
        return assignment(Role::Excluded, TcHookSet::NONE);
    }
    let is_uplink = uplinks.contain(link.index);
    // A pod's link to the bridge of the NIC is beside the uplink, but leads to the pod only.
    let is_exit = is_uplink && (!link.leads_elsewhere() || uplinks.are_routed(link.index));
    if interfaces.includes(&link.name) {
        return assignment(Role::Pod, if is_exit { TcHookSet::BOTH } else { TcHookSet::FROM_POD });
    }
    if link.leads_elsewhere() {
        let role = if uplinks.are_routed(link.index) { Role::Uplink } else { Role::Pod };
        let is_sure = is_known_pod && !is_exit;
        return assignment(role, if is_sure { TcHookSet::FROM_POD } else { TcHookSet::BOTH });
    }
    // No route to an endpoint uses the device.
    if link.unsupported_type.is_some() && !is_uplink {
        return assignment(Role::Other, TcHookSet::NONE);
    }
    let role = match link.kind {
        LinkKind::Ifb => return assignment(Role::Ifb, TcHookSet::NONE),
        _ if is_uplink => Role::Uplink,
        LinkKind::Bridge => Role::Bridge,
        _ => Role::Other,
    };
    assignment(role, TcHookSet::NODE_EGRESS)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::Config;

    fn link(name: &str, kind: LinkKind, peer_netns: Option<i32>) -> Link {
        Link { name: name.to_owned(), kind, peer_netns, ..Link::with_index(7) }
    }

    fn sure(routed: &[u32]) -> EndpointRoutes {
        EndpointRoutes { sure: routed.iter().copied().collect(), ..EndpointRoutes::default() }
    }

    fn assigned(link: &Link, routed: &[u32], config: &str) -> (Role, TcHookSet) {
        let config = Config::parse(config, Path::new("test")).unwrap();
        let uplinks = Uplinks::new(&sure(routed), std::iter::once(link));
        let Assignment { role, hooks } = assign(link, &uplinks, &config.interfaces, false);
        (role, hooks)
    }

    #[test]
    fn veth_with_remote_peer_gets_both_hooks() {
        for kind in [LinkKind::Veth, LinkKind::Netkit] {
            assert_eq!(assigned(&link("v", kind, Some(0)), &[], ""), (Role::Pod, TcHookSet::BOTH));
            assert_eq!(assigned(&link("v", kind, Some(0)), &[7], ""), (Role::Uplink, TcHookSet::BOTH));
            assert_eq!(assigned(&link("v", kind, None), &[], ""), (Role::Other, TcHookSet::NODE_EGRESS));
        }
    }

    #[test]
    fn known_pod_gets_from_pod_only() {
        let pod = link("v", LinkKind::Veth, Some(0));
        let hooks = |routed: &[u32]| {
            let uplinks = Uplinks::new(&sure(routed), std::iter::once(&pod));
            assign(&pod, &uplinks, &Interfaces::default(), true).hooks
        };
        assert_eq!(hooks(&[]), TcHookSet::FROM_POD);
        assert_eq!(hooks(&[7]), TcHookSet::BOTH);
    }

    #[test]
    fn other_kinds() {
        let egress = TcHookSet::NODE_EGRESS;
        assert_eq!(assigned(&link("eth0", LinkKind::Other, None), &[7], ""), (Role::Uplink, egress));
        assert_eq!(assigned(&link("br0", LinkKind::Bridge, None), &[7], ""), (Role::Uplink, egress));
        assert_eq!(
            assigned(&link("lo", LinkKind::Loopback, None), &[], ""),
            (Role::Loopback, TcHookSet::NONE)
        );
        assert_eq!(assigned(&link("cni0", LinkKind::Bridge, None), &[], ""), (Role::Bridge, egress));
        assert_eq!(assigned(&link("tun0", LinkKind::Other, None), &[], ""), (Role::Other, egress));
        let ib0 = Link { unsupported_type: Some(32), ..link("ib0", LinkKind::Other, None) };
        assert_eq!(assigned(&ib0, &[], ""), (Role::Other, TcHookSet::NONE));
        assert_eq!(assigned(&ib0, &[7], ""), (Role::Uplink, egress));
        assert_eq!(assigned(&link("ifb0", LinkKind::Ifb, None), &[], ""), (Role::Ifb, TcHookSet::NONE));
        assert_eq!(assigned(&link("x", LinkKind::Unreadable, None), &[], ""), (Role::Pod, TcHookSet::BOTH));
    }

    #[test]
    fn operator_decides_first() {
        let include = "[interfaces]\ninclude = ['tun*', 'lo']";
        let tun = link("tun0", LinkKind::Other, None);
        assert_eq!(assigned(&tun, &[], include), (Role::Pod, TcHookSet::FROM_POD));
        assert_eq!(assigned(&tun, &[7], include), (Role::Pod, TcHookSet::BOTH));
        assert_eq!(assigned(&link("lo", LinkKind::Loopback, None), &[], include).0, Role::Loopback);

        let exclude = "[interfaces]\nexclude = ['v*', 'eth0']";
        for excluded in [
            link("v0", LinkKind::Veth, Some(3)),
            link("v0", LinkKind::Veth, None),
            link("eth0", LinkKind::Other, None),
        ] {
            assert_eq!(assigned(&excluded, &[7], exclude), (Role::Excluded, TcHookSet::NONE));
        }
        let both = "[interfaces]\ninclude = ['*']\nexclude = ['v0']";
        assert_eq!(assigned(&link("v0", LinkKind::Veth, Some(3)), &[], both).0, Role::Excluded);
    }

    #[test]
    fn ports_of_an_uplink_are_uplinks() {
        let port = |index, master| Link { master: Some(master), ..Link::with_index(index) };
        let bridge = Link { kind: LinkKind::Bridge, ..Link::with_index(1) };
        let nic = port(2, 1);
        let vlan = Link { lower: Some(2), ..Link::with_index(3) };
        let other_port = port(4, 9);
        let links = [bridge, nic, vlan, other_port];
        let uplinks = |routed| Uplinks::new(&sure(&[routed]), links.iter());
        assert!([1, 2].into_iter().all(|index| uplinks(1).contain(index)));
        assert!(!uplinks(1).contain(4) && !uplinks(1).contain(3));
        assert!([1, 2, 3].into_iter().all(|index| uplinks(3).contain(index)));
        assert!(uplinks(3).are_routed(3) && !uplinks(3).are_routed(2));
    }
    #[test]
    fn link_local_routes_make_no_pod_an_uplink() {
        let with_index = |index, kind, master| Link { kind, master, ..Link::with_index(index) };
        let remote =
            |index, master| Link { peer_netns: Some(0), ..with_index(index, LinkKind::Veth, master) };
        let links = [
            with_index(1, LinkKind::Bond, None),
            with_index(2, LinkKind::Other, Some(1)),
            with_index(3, LinkKind::Bridge, None),
            remote(4, Some(3)),
            remote(5, None),
            with_index(6, LinkKind::Netkit, None),
        ];
        let all = links.iter().map(|link| link.index).collect();
        let uplinks =
            |sure| Uplinks::new(&EndpointRoutes { sure, link_local: BTreeSet::clone(&all) }, links.iter());
        let ours = uplinks(BTreeSet::new());
        assert!([1, 3].into_iter().all(|index| ours.are_routed(index)) && ours.contain(2));
        assert!(![4, 5, 6].into_iter().any(|index| ours.contain(index) || ours.are_routed(index)));
        // A route that leads to the endpoint still counts.
        let routed = uplinks(BTreeSet::from([5]));
        assert!(routed.are_routed(5) && !routed.contain(4));
    }

    #[test]
    fn known_pods_on_the_bridge_of_the_nic_get_from_pod_only() {
        let bridge = Link { kind: LinkKind::Bridge, ..Link::with_index(1) };
        let port =
            |index, kind, peer_netns| Link { kind, peer_netns, master: Some(1), ..Link::with_index(index) };
        let [nic, pod] = [port(2, LinkKind::Other, None), port(3, LinkKind::Veth, Some(0))];
        let uplinks = Uplinks::new(&sure(&[1]), [&bridge, &nic, &pod]);
        let hooks = |link: &Link, config: &str, is_known| {
            let config = Config::parse(config, Path::new("test")).unwrap();
            assign(link, &uplinks, &config.interfaces, is_known).hooks
        };
        let include = "[interfaces]\ninclude = ['*']";
        assert_eq!(hooks(&pod, "", false), TcHookSet::BOTH);
        assert_eq!(hooks(&pod, "", true), TcHookSet::FROM_POD);
        assert_eq!(hooks(&pod, include, false), TcHookSet::FROM_POD);
        assert_eq!(hooks(&nic, include, false), TcHookSet::BOTH);
    }
}
