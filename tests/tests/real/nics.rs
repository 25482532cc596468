//! Exempt pods and the node's own traffic on nodes whose packets leave through more than one interface.

use imds_tests::{
    AttachMode, CniNetwork, Pod, PodLink, TestEnv, WHOLE_TEST, cni::plugin, known_here, lacks_device,
    lacks_program, poll::poll_until, probe::LONG, skip_without_tcx,
};
use serde_json::{Value, json};

use crate::{PACKETS, assert_exempt_with, exemption, plugins::ptp, run};

const NIC: &str = "nic0";
/// Bridge between the node's address and its NIC.
const OUTER_BRIDGE: &str = "br-ex";
const MODES: &[AttachMode] = &[AttachMode::Tcx, AttachMode::Clsact];

/// Kind of the node's NIC.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Nic {
    /// The veth uplink of a [`TestEnv`].
    Veth,
    /// A device without a peer in another namespace, which the agent cannot mistake for a pod interface.
    Macvlan,
}

impl Nic {
    /// Replaces the node's uplink by this NIC without an address. Returns its name.
    pub(crate) fn install(self, env: &TestEnv) -> &'static str {
        match self {
            Self::Veth => {
                let uplink = TestEnv::UPLINK;
                env.node.ip(&format!("addr flush dev {uplink}"));
                uplink
            }
            Self::Macvlan => {
                let (uplink, fabric, node) = (TestEnv::UPLINK, env.fabric.name(), env.node.name());
                env.node.ip(&format!("link set {uplink} netns {fabric}"));
                env.fabric.ip(&format!(
                    "link set {uplink} up
                     link add {NIC} link {uplink} netns {node} type macvlan mode passthru"
                ));
                env.node.ip(&format!("link set {NIC} up"));
                NIC
            }
        }
    }
}

/// Moves the node's address and its default route to an interface.
pub(crate) fn set_address(env: &TestEnv, interface: &str) {
    env.node.ip(&format!(
        "link set {interface} up
         addr add {}/24 dev {interface}
         route add default via 10.0.0.1",
        env.node_address()
    ));
}

/// Moves the node's address to a bridge with a NIC, and returns a network of pods on that bridge, which are neighbours of
/// the node.
pub(crate) fn nic_bridge<'w>(env: &'w TestEnv, chained: &[Value]) -> CniNetwork<'w> {
    let nic = Nic::Macvlan.install(env);
    env.node.ip(&format!("link add {OUTER_BRIDGE} type bridge\nlink set {nic} master {OUTER_BRIDGE}"));
    set_address(env, OUTER_BRIDGE);
    let addresses = json!({ "subnet": "10.0.0.0/24", "rangeStart": "10.0.0.64", "gateway": "10.0.0.1" });
    let bridge = json!({ "type": "bridge", "bridge": OUTER_BRIDGE });
    env.cni_network(&addresses, &[&[bridge], chained].concat())
}

pub(crate) fn lacks_macvlan() -> bool {
    lacks_device(WHOLE_TEST, "macvlan", "link lower0 type macvlan mode passthru")
}

/// Asserts access of an exempt pod and denial of another one, for each kind of link.
pub(crate) fn assert_exempt_pods(env: &TestEnv) {
    for link in [PodLink::Routed, PodLink::Bridged] {
        let [exempt, other]: [Pod; 2] = [env.add_pod(link), env.add_pod(link)];
        let config = exemption(&format!("interface = '{}'", exempt.host_ifname));
        assert_exempt_with(env, &config, Some(&exempt.netns), &[&other.netns], MODES);
    }
}

fn assert_outer_bridge(nic: Nic) {
    let env = TestEnv::new();
    let nic = nic.install(&env);
    env.node.ip(&format!("link add {OUTER_BRIDGE} type bridge\nlink set {nic} master {OUTER_BRIDGE}"));
    set_address(&env, OUTER_BRIDGE);
    assert_exempt_pods(&env);
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
    let env = TestEnv::new();
    let nic = nic.install(&env);
    set_address(&env, nic);
    env.node.ip("link add ifb0 type ifb\nlink set ifb0 up");
    for line in [
        &format!("tc qdisc add dev {nic} clsact"),
        &format!("tc filter add dev {nic} egress u32 match u32 0 0 action mirred egress redirect dev ifb0"),
        "tc qdisc add dev ifb0 root tbf rate 80mbit burst 1mb latency 100ms",
    ] {
        run(&env.node, line);
    }
    assert_exempt_pods(&env);
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

/// Asserts that the links of new pods have the role `pod`, and that no first attachment counts as a repair.
#[track_caller]
fn assert_no_drift(config: &str, make: for<'w> fn(&'w TestEnv, &[Value]) -> CniNetwork<'w>) {
    if lacks_program(WHOLE_TEST, &[&plugin("ptp"), &plugin("bridge"), "iptables"]) || skip_without_tcx() {
        return;
    }
    let env = TestEnv::new();
    let network = make(&env, &[]);
    let agent = env.agent().config(config).hooks(&known_here(PACKETS)).backend(AttachMode::Tcx).spawn_ready();
    for _ in 0..3 {
        let pod = network.add_pod();
        // `node_egress` comes last, when no more links appear.
        poll_until(LONG, "both hooks on the pod's link", || {
            let status = env.status();
            PACKETS.iter().all(|hook| status.has_attached(pod.veth(), hook)).then_some(())
        });
        assert_eq!(env.status().interface(pod.veth()).role, "pod");
        pod.delete();
    }
    assert!(!agent.log().contains(" again with "), "{}", agent.log());
}

#[test]
fn pods_with_a_link_local_endpoint_are_no_drift() {
    assert_no_drift("provider = 'hetzner'\n", ptp);
}

#[test]
fn pods_on_the_bridge_of_the_nic_are_no_drift() {
    if !lacks_macvlan() {
        assert_no_drift("", nic_bridge);
    }
}
