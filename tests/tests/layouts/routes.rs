//! Default routes that are added and removed while pods send.

use imds_tests::{
    Layout, METADATA, Nic, Pod, PodLink, TestEnv,
    flood::Flood,
    poll::poll_until,
    probe::{LONG, reachable},
    scaled,
};

use crate::fixture::NODE_EGRESS;

const ROUNDS: u32 = 20;
/// Number of packets of each pod while the route exists.
const PACKETS: u64 = 200;

/// Adds a permanent neighbour entry, so that packets leave the pod without ARP. The node answers ARP only while it has
/// a route.
fn add_gateway_neighbour(pod: &Pod) {
    let [gateway, mac] = match pod.link {
        PodLink::Routed | PodLink::Netkit(_) => ["169.254.1.1", "ee:ee:ee:ee:ee:ee"],
        PodLink::Bridged => ["10.244.2.1", "02:42:0a:f4:02:01"],
    };
    pod.netns.ip(&format!("neigh replace {gateway} lladdr {mac} dev {} nud permanent", Pod::IFNAME));
}

fn change_default(env: &TestEnv, verb: &str) {
    env.node.ip(&format!("route {verb} default via 10.0.0.1 dev {}", TestEnv::UPLINK));
}

/// Asserts that no packet of a pod arrives while the route changes. `arguments` are those of `imds-agent run`.
fn assert_never_open(nic: Nic, arguments: &[&str]) {
    // The node always reaches the other service, whose neighbour entry is known.
    let layout = Layout::new(nic).routes("route add 198.51.100.10/32 via 10.0.0.1");
    let env = TestEnv::with_layout(layout);
    let pods = [PodLink::Routed, PodLink::Bridged].map(|link| env.add_pod(link));
    pods.iter().for_each(add_gateway_neighbour);
    assert!(pods.iter().all(|pod| env.received_packets().from(pod.address) == 0));
    change_default(&env, "add");
    assert!(pods.iter().all(|pod| reachable(&pod.netns, METADATA)), "without the agent");
    change_default(&env, "delete");

    let agent = env.agent().hooks(NODE_EGRESS).args(arguments).spawn_ready();
    let before = env.received_packets();
    let floods = pods.each_ref().map(|pod| Flood::udp(pod, METADATA));
    for _ in 0..scaled(ROUNDS) {
        change_default(&env, "add");
        for flood in &floods {
            let start = flood.sent();
            poll_until(LONG, "packets of a flood", || (flood.sent() > start + PACKETS).then_some(()));
        }
        change_default(&env, "delete");
    }
    change_default(&env, "add");
    drop(floods);
    for pod in &pods {
        let (link, after) = (pod.link, env.received_packets());
        assert_eq!(after.from(pod.address), before.from(pod.address), "{link:?} pod: {}", agent.log());
    }
    assert!(reachable(&env.node, METADATA), "the node");
    drop(agent);
    env.unload();
    assert!(pods.iter().all(|pod| reachable(&pod.netns, METADATA)), "after unload");
}

#[test]
fn default_route_of_nic() {
    assert_never_open(Nic::Macvlan, &[]);
}

#[test]
fn default_route_of_veth_nic() {
    assert_never_open(Nic::Veth, &[]);
}

/// A clsact filter needs a qdisc. The agent leaves the qdisc slot to CNI plugins for a while and is not ready before.
#[test]
fn default_route_of_veth_nic_by_clsact() {
    assert_never_open(Nic::Veth, &["--tc-backend", "clsact", "--clsact-delay", "1"]);
}
