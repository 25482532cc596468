//! NICs that are ports of a bridge.

use std::net::Ipv4Addr;

use imds_tests::{
    Layout, METADATA, Nic, Pod, PodLink, TestEnv, output,
    probe::{Outcome, SHORT, http_get, udp_echo},
};

use crate::fixture::{Case, assert_denied_at_egress};

pub(crate) const BRIDGE: &str = "br-ex";

pub(crate) fn bridge(nic: Nic) -> Layout {
    let setup =
        format!("link add {BRIDGE} type bridge\nlink set {uplink} master {BRIDGE}", uplink = TestEnv::UPLINK);
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

/// A bridge that learns no addresses sends a copy of each packet to all ports but the oldest one, which gets the packet.
#[test]
fn bridge_floods_nic() {
    let setup = format!(
        "link add {BRIDGE} type bridge ageing_time 0
         link add other0 type veth peer name other1
         link set other0 master {BRIDGE}
         link set other0 up
         link set other1 up
         link set {uplink} master {BRIDGE}",
        uplink = TestEnv::UPLINK
    );
    Case::new(Layout::new(Nic::Macvlan).above(&setup, BRIDGE)).assert_enforced();
}

/// Adds a veth pair with both ends in the node's namespace: one has the node's address, the other is a port of the
/// bridge.
fn veth_pair(nic: Nic) -> Layout {
    let setup = format!(
        "link add {BRIDGE} type bridge
         link set {uplink} master {BRIDGE}
         link set {BRIDGE} up
         link add inner0 type veth peer name inner1
         link set inner1 master {BRIDGE}
         link set inner1 up",
        uplink = TestEnv::UPLINK
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

/// Moves the pod to a port of the NIC's bridge, with an address of the node's subnet.
fn join_bridge(env: &TestEnv, pod: &mut Pod) {
    let [.., host] = pod.address.octets();
    let veth = &pod.host_ifname;
    let offset = match pod.link {
        PodLink::Routed | PodLink::Netkit(_) => {
            env.node.ip(&format!("route delete {}/32 dev {veth}", pod.address));
            50
        }
        PodLink::Bridged => 100,
    };
    pod.address = [10, 0, 0, offset + host].into();
    env.node.ip(&format!("link set {veth} master {BRIDGE}"));
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

/// Address of a Service whose backend is the endpoint.
const CLUSTER_IP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 80);

/// Translates the Service's address for pods and for the node.
fn add_service(env: &TestEnv) {
    let mut nft = env.node.command("nft");
    nft.arg(format!(
        "table ip service {{
            chain prerouting {{ type nat hook prerouting priority -100; ip daddr {CLUSTER_IP} dnat to {METADATA}; }}
            chain output {{ type nat hook output priority -100; ip daddr {CLUSTER_IP} dnat to {METADATA}; }}
        }}"
    ));
    let output = output(nft);
    assert!(output.status.success(), "nft: {}", String::from_utf8_lossy(&output.stderr));
}

/// Prevents the node's bridges from passing packets to netfilter, which `br_netfilter` does by default.
pub(crate) fn disable_bridge_netfilter(env: &TestEnv) {
    const KEY: &str = "bridge/bridge-nf-call-iptables";
    if env.node.has_sysctl(KEY) {
        env.node.sysctl(KEY, "0");
    }
}

/// Moves the gateway of bridged pods from their bridge to a veth pair with both ends in the node's namespace. The other
/// end is a port of the bridge.
fn move_gateway_behind_pair(env: &TestEnv, pod: &Pod) {
    let bridge = TestEnv::BRIDGE;
    // Prevents the bridge from answering ARP requests for the address of `gateway0`.
    env.node.sysctl(&format!("ipv4/conf/{bridge}/arp_ignore"), "1");
    let [a, b, c, _] = pod.address.octets();
    env.node.ip(&format!(
        "addr flush dev {bridge}
         link add gateway0 type veth peer name gateway1
         link set gateway1 master {bridge}
         link set gateway1 up
         link set gateway0 up
         addr add {a}.{b}.{c}.1/18 dev gateway0"
    ));
}

/// `node_egress` of `gateway1` sees the Service's address. `node_egress` of the NIC sees the endpoint's address and, as
/// the ingress interface, `gateway0`, which is not a port of the bridge.
#[test]
fn service_behind_veth_pair() {
    let env = TestEnv::new();
    // A bridge that translates the address would route packets past the pair.
    disable_bridge_netfilter(&env);
    let pod = env.add_pod(PodLink::Bridged);
    move_gateway_behind_pair(&env, &pod);
    add_service(&env);
    assert_denied_at_egress(&env, pod.address, CLUSTER_IP, || {
        let answers = [http_get(&pod.netns, CLUSTER_IP, SHORT), udp_echo(&pod.netns, CLUSTER_IP, SHORT)];
        answers.iter().all(Outcome::is_answer)
    });
}
