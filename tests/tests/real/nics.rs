//! Exempt pods and the node's own traffic on nodes whose packets leave through more than one interface.

use imds_tests::{AttachMode, Pod, PodLink, WHOLE_TEST, World, lacks_device};

use crate::{assert_exempt_with, exemption, run};

const NIC: &str = "nic0";
/// Bridge between the node's address and its NIC.
const OUTER_BRIDGE: &str = "br-ex";
const MODES: &[AttachMode] = &[AttachMode::Tcx, AttachMode::Clsact];

/// Kind of the node's NIC.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Nic {
    /// The veth uplink of a [`World`].
    Veth,
    /// A device without a peer in another namespace, which the agent cannot mistake for a pod interface.
    Macvlan,
}

impl Nic {
    /// Replaces the node's uplink by this NIC without an address. Returns its name.
    pub(crate) fn install(self, world: &World) -> &'static str {
        match self {
            Self::Veth => {
                let uplink = World::UPLINK;
                world.node.ip(&format!("addr flush dev {uplink}"));
                uplink
            }
            Self::Macvlan => {
                let (uplink, fabric, node) = (World::UPLINK, world.fabric.name(), world.node.name());
                world.node.ip(&format!("link set {uplink} netns {fabric}"));
                world.fabric.ip(&format!(
                    "link set {uplink} up
                     link add {NIC} link {uplink} netns {node} type macvlan mode passthru"
                ));
                world.node.ip(&format!("link set {NIC} up"));
                NIC
            }
        }
    }
}

/// Moves the node's address and its default route to an interface.
pub(crate) fn set_address(world: &World, interface: &str) {
    world.node.ip(&format!(
        "link set {interface} up
         addr add {}/24 dev {interface}
         route add default via 10.0.0.1",
        world.node_address()
    ));
}

pub(crate) fn lacks_macvlan() -> bool {
    lacks_device(WHOLE_TEST, "macvlan", "link lower0 type macvlan mode passthru")
}

/// Asserts access of an exempt pod and denial of another one, for each kind of link.
pub(crate) fn assert_exempt_pods(world: &World) {
    for link in [PodLink::Routed, PodLink::Bridged] {
        let [exempt, other]: [Pod; 2] = [world.add_pod(link), world.add_pod(link)];
        let config = exemption(&format!("interface = '{}'", exempt.host_ifname));
        assert_exempt_with(world, &config, Some(&exempt.netns), &[&other.netns], MODES);
    }
}

fn assert_outer_bridge(nic: Nic) {
    let world = World::new();
    let nic = nic.install(&world);
    world.node.ip(&format!("link add {OUTER_BRIDGE} type bridge\nlink set {nic} master {OUTER_BRIDGE}"));
    set_address(&world, OUTER_BRIDGE);
    assert_exempt_pods(&world);
}

#[test]
fn bridge_in_front_of_macvlan() {
    if !lacks_macvlan() {
        assert_outer_bridge(Nic::Macvlan);
    }
}

#[test]
fn bridge_in_front_of_veth() {
    assert_outer_bridge(Nic::Veth);
}

fn assert_ifb(nic: Nic) {
    let world = World::new();
    let nic = nic.install(&world);
    set_address(&world, nic);
    world.node.ip("link add ifb0 type ifb\nlink set ifb0 up");
    for line in [
        &format!("tc qdisc add dev {nic} clsact"),
        &format!("tc filter add dev {nic} egress u32 match u32 0 0 action mirred egress redirect dev ifb0"),
        "tc qdisc add dev ifb0 root tbf rate 80mbit burst 1mb latency 100ms",
    ] {
        run(&world.node, line);
    }
    assert_exempt_pods(&world);
}

fn lacks_ifb() -> bool {
    lacks_device(WHOLE_TEST, "ifb", "type ifb")
}

#[test]
fn macvlan_shaped_by_ifb() {
    if !lacks_macvlan() && !lacks_ifb() {
        assert_ifb(Nic::Macvlan);
    }
}

#[test]
fn veth_shaped_by_ifb() {
    if !lacks_ifb() {
        assert_ifb(Nic::Veth);
    }
}
