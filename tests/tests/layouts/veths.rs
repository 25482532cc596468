//! Uplinks that are veths with a peer in another namespace, like pod interfaces, and that are not in the main IPv4
//! table.

use imds_tests::{Layout, METADATA_V6, Nic, Pod, PodLink, Source, TestEnv, WHOLE_TEST, lacks_device};

use crate::fixture::Case;

#[test]
fn ipv6_only() {
    for nic in [Nic::Veth, Nic::Macvlan] {
        Case::new(Layout::new(nic).ipv6_only()).with_ipv6_target(METADATA_V6).assert_enforced();
    }
}

/// Packets of pods and of the node leave by routes of a table that routing rules select by source address.
#[test]
fn policy_routing() {
    for nic in [Nic::Veth, Nic::Macvlan] {
        let layout = Layout::new(nic).routes(&format!(
            "rule add from 10.244.0.0/16 lookup 7
             rule add from 10.0.0.4 lookup 7
             route add default via 10.0.0.1 dev {uplink} table 7
             route add 198.51.100.10/32 via 10.0.0.1",
            uplink = TestEnv::UPLINK
        ));
        let mut case = Case::new(layout);
        case.source = Source { address: Some(case.env.node_address()), device: None };
        case.assert_enforced();
    }
}

const VRF: &str = "vrf0";

fn join_vrf(env: &TestEnv, pod: &mut Pod) {
    let (veth, address) = (&pod.host_ifname, pod.address);
    match pod.link {
        // Moving the interface into the VRF deletes its route.
        PodLink::Routed | PodLink::Netkit(_) => {
            env.node.ip(&format!("link set {veth} master {VRF}\nroute add {address}/32 dev {veth} table 10"));
        }
        PodLink::Bridged => env.node.ip(&format!("link set {} master {VRF}", TestEnv::BRIDGE)),
    }
}

#[test]
fn vrf() {
    if lacks_device(WHOLE_TEST, "VRF", "type vrf table 10") {
        return;
    }
    for nic in [Nic::Veth, Nic::Macvlan] {
        let uplink = TestEnv::UPLINK;
        let setup =
            format!("link add {VRF} type vrf table 10\nlink set {VRF} up\nlink set {uplink} master {VRF}");
        let routes = format!(
            "route add default via 10.0.0.1 dev {uplink} table 10
             route add 198.51.100.10/32 via 10.0.0.1 dev {uplink} onlink"
        );
        let layout = Layout::new(nic).above(&setup, uplink).routes(&routes);
        let mut case = Case::new(layout).place(join_vrf).unknown_at_egress();
        case.source = Source { address: None, device: Some(VRF) };
        case.assert_enforced();
    }
}
