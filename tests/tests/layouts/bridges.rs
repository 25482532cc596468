//! NICs that are ports of a bridge.

use imds_tests::{Layout, Nic, Pod, PodLink, World};

use crate::fixture::Case;

pub(crate) const BRIDGE: &str = "br-ex";

fn bridge(nic: Nic) -> Layout {
    let setup =
        format!("link add {BRIDGE} type bridge\nlink set {uplink} master {BRIDGE}", uplink = World::UPLINK);
    Layout::new(nic).above(&setup, BRIDGE)
}

#[test]
fn nic_in_bridge() {
    Case::new(bridge(Nic::Macvlan)).assert_enforced();
}

#[test]
fn veth_nic_in_bridge() {
    Case::new(bridge(Nic::Veth)).assert_enforced();
}

/// A veth pair with both ends in the node's namespace: one has the node's address, the other is the bridge's port.
fn veth_pair(nic: Nic) -> Layout {
    let setup = format!(
        "link add {BRIDGE} type bridge
         link set {uplink} master {BRIDGE}
         link set {BRIDGE} up
         link add inner0 type veth peer name inner1
         link set inner1 master {BRIDGE}
         link set inner1 up",
        uplink = World::UPLINK
    );
    Layout::new(nic).above(&setup, "inner0")
}

#[test]
fn veth_pair_to_bridge() {
    Case::new(veth_pair(Nic::Macvlan)).assert_enforced();
}

#[test]
fn veth_pair_to_bridge_of_veth_nic() {
    Case::new(veth_pair(Nic::Veth)).assert_enforced();
}

/// Makes the pod a port of the NIC's bridge, with an address of the node's subnet.
fn join_bridge(world: &World, pod: &mut Pod) {
    let [.., host] = pod.address.octets();
    let veth = &pod.host_ifname;
    let offset = match pod.link {
        PodLink::Routed | PodLink::Netkit(_) => {
            world.node.ip(&format!("route delete {}/32 dev {veth}", pod.address));
            50
        }
        PodLink::Bridged => 100,
    };
    pod.address = [10, 0, 0, offset + host].into();
    world.node.ip(&format!("link set {veth} master {BRIDGE}"));
    pod.netns.ip(&format!(
        "addr flush dev {eth0}\naddr add {}/24 dev {eth0}\nroute add default via 10.0.0.1",
        pod.address,
        eth0 = Pod::IFNAME
    ));
}

#[test]
fn pods_in_bridge_of_nic() {
    Case::new(bridge(Nic::Macvlan)).place(join_bridge).known_at_egress().assert_enforced();
}

#[test]
fn pods_in_bridge_of_veth_nic() {
    Case::new(bridge(Nic::Veth)).place(join_bridge).known_at_egress().assert_enforced();
}
