//! Pods without a veth of their own, and network namespaces behind a pod's.

use std::net::{Ipv4Addr, UdpSocket};

use imds_tests::{
    AttackVectors, METADATA, Netns, Pod, PodLink, SERVICE, TestEnv, TxRing, WHOLE_TEST,
    hook::run_tc,
    lacks_device, lacks_tc_netns_cookie, output, packets,
    poll::poll_until,
    probe::{LONG, SHORT, http_get, udp_echo},
};

use crate::{ALL, TC_HOOKS, services::nft};

/// Attempts with a vector that must change something while packets wait in a queue.
pub(crate) const ATTEMPTS: usize = 10;

/// Returns the hooks that can deny a pod without its own interface on the node, with this kernel.
fn hooks_without_link() -> Vec<&'static str> {
    let without = lacks_tc_netns_cookie("`node_egress`");
    if without { vec!["socket"] } else { vec!["socket", "node_egress"] }
}

fn tcp_and_udp<'w>(vectors: AttackVectors<'w>, netns: &'w Netns) -> AttackVectors<'w> {
    vectors
        .vector("TCP", || http_get(netns, METADATA, SHORT).is_answer())
        .vector("UDP", || udp_echo(netns, METADATA, SHORT).is_answer())
}

/// Adds a pod whose interface is a child of the node's uplink. The node has no interface for such a pod.
fn add_pod_on_uplink(env: &TestEnv, options: &str) -> Netns {
    let pod = Netns::new("upper");
    env.node.ip(&format!("link add upper0 link {} netns {} {options}", TestEnv::UPLINK, pod.name()));
    pod.ip("link set lo up\naddr add 10.0.0.77/24 dev upper0\nlink set upper0 up\nroute add default via 10.0.0.1");
    if options.contains("mode l3") {
        // The fabric gets no ARP reply for the pod's address.
        env.fabric.ip(&format!("route add 10.0.0.77/32 via {}", env.node_address()));
    }
    pod
}

fn assert_pod_on_uplink_blocked(kind: &str, options: &str) {
    if lacks_device(WHOLE_TEST, kind, &format!("link lower0 {options}")) {
        return;
    }
    let env = TestEnv::new();
    let pod = add_pod_on_uplink(&env, options);
    tcp_and_udp(env.vectors(&hooks_without_link()), &pod).assert_blocked_all();
}

#[test]
fn macvlan() {
    assert_pod_on_uplink_blocked("macvlan", "type macvlan mode bridge");
}

#[test]
fn macvlan_in_private_mode() {
    assert_pod_on_uplink_blocked("macvlan", "type macvlan mode private");
}

#[test]
fn ipvlan_in_layer_2() {
    assert_pod_on_uplink_blocked("ipvlan", "type ipvlan mode l2");
}

#[test]
fn ipvlan_in_layer_3() {
    assert_pod_on_uplink_blocked("ipvlan", "type ipvlan mode l3");
}

#[test]
fn ipvlan_in_layer_3_with_netfilter() {
    assert_pod_on_uplink_blocked("ipvlan", "type ipvlan mode l3s");
}

/// A macvlan device sends the pages of a transmit ring without a copy. The pod queues a frame for another address in the qdisc of
/// the uplink, behind others, and then changes its destination.
#[test]
fn frames_changed_in_the_uplinks_queue() {
    const POD: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 77);
    let options = "type macvlan mode bridge";
    if lacks_device(WHOLE_TEST, "macvlan", &format!("link lower0 {options}"))
        || lacks_tc_netns_cookie(WHOLE_TEST)
    {
        return;
    }
    let env = TestEnv::new();
    let pod = add_pod_on_uplink(&env, options);
    run_tc(&env.node, &words("qdisc add dev uplink0 root tbf rate 1mbit burst 3000 latency 400ms"));
    let fabric = env.fabric_frames();
    // Ethernet addresses are not compared: the fabric's packet socket sees every frame.
    let frame = |destination, payload: &[u8]| {
        [&[0xff; 6][..], &[2, 0, 0, 0, 0, 9], &[8, 0], &packets::udp(POD, destination, payload)].concat()
    };
    let is_changed_on_arrival = || {
        let mut ring = TxRing::new(&pod, "upper0");
        for _ in 0..8 {
            ring.send(&frame(SERVICE, &[0; 1200]));
        }
        let slot = ring.send(&frame(SERVICE, b"original"));
        ring.write(slot, &frame(METADATA, b"modified"));
        let arrived = fabric.find(LONG, |frame| frame.ends_with(b"original") || frame.ends_with(b"modified"));
        arrived.expect("one of the frames arrives").ends_with(b"modified")
    };
    // On a busy machine the frame can leave the queue before it is changed.
    let is_open = || (0..ATTEMPTS).any(|_| is_changed_on_arrival());
    assert!(is_open());
    let agent = env.agent().hooks(&TC_HOOKS).spawn_ready();
    assert!(!is_changed_on_arrival());
    drop(agent);
    env.unload();
    assert!(is_open());
}

pub(crate) fn lacks_ifb() -> bool {
    lacks_device(WHOLE_TEST, "ifb", "type ifb")
}

pub(crate) fn add_ifb(pod: &Netns) {
    pod.ip("link add ifb0 type ifb\nlink set ifb0 up");
    run_tc(pod, &words("qdisc add dev ifb0 root tbf rate 256kbit burst 1600 limit 100000"));
}

/// Sends datagrams to the echo port of the endpoint through the pod's ifb, and returns the socket.
///
/// Packets that leave an ifb device skip the next TC ingress hook, `from_pod` (`skb->tc_skip_classify`), unless a
/// `mirred` action clears the flag first. The pod delays them with `tbf`, and deletes its filter before they leave.
pub(crate) fn send_by_ifb(pod: &Netns) -> UdpSocket {
    run_tc(pod, &words("qdisc add dev eth0 clsact"));
    let redirect = format!(
        "filter add dev eth0 egress protocol ip u32 match ip dst {METADATA} action mirred egress redirect dev ifb0"
    );
    run_tc(pod, &words(&redirect));
    let socket = pod.run(|| UdpSocket::bind("0.0.0.0:0")).expect("a UDP socket");
    for _ in 0..20 {
        // The socket hook denies the call if it is on.
        let _refused = socket.send_to(&[0; 200], (METADATA, 7));
    }
    run_tc(pod, &words("qdisc del dev eth0 clsact"));
    let is_empty = || {
        let mut command = pod.command("tc");
        command.args(words("-s -json qdisc show dev ifb0"));
        let output = output(command);
        let qdiscs: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON of tc");
        qdiscs[0]["backlog"] == 0
    };
    poll_until(LONG, "the ifb to send its queue", || is_empty().then_some(()));
    socket
}

#[test]
fn ifb_in_the_pod() {
    if lacks_ifb() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    add_ifb(&pod.netns);
    env.vectors(&["node_egress"])
        .one_vector("UDP through an ifb", || drop(send_by_ifb(&pod.netns)))
        .assert_blocked_all();
}

fn words(text: &str) -> Vec<&str> {
    text.split_whitespace().collect()
}

/// Tests a pod with one end of a netkit pair. Without a mode the pair is in layer 3; older versions of `ip` do not
/// support modes.
fn assert_netkit_blocked(options: &str) {
    if lacks_device(WHOLE_TEST, "netkit", options) {
        return;
    }
    let env = TestEnv::new();
    let pod = Netns::new("netkit");
    // The kernel names the other end nk0.
    env.node.ip(&format!(
        "link add host0 {options}
         link set nk0 netns {} name eth0
         link set host0 up
         addr add 172.28.0.1/24 dev host0",
        pod.name()
    ));
    pod.ip(
        "link set lo up\naddr add 172.28.0.2/24 dev eth0\nlink set eth0 up\nroute add default via 172.28.0.1",
    );
    env.fabric.ip(&format!("route add 172.28.0.0/24 via {}", env.node_address()));
    tcp_and_udp(env.vectors(&ALL), &pod).assert_blocked_all();
}

#[test]
fn netkit_in_layer_2() {
    assert_netkit_blocked("type netkit mode l2");
}

#[test]
fn netkit_in_layer_3() {
    assert_netkit_blocked("type netkit");
}

/// Adds a network namespace inside a pod. The pod forwards its traffic with source NAT.
fn add_nested(pod: &Netns, interface: &str) -> Netns {
    let nested = Netns::new("nested");
    pod.ip(&format!(
        "link add in0 type veth peer name out0 netns {}\naddr add 172.31.0.1/24 dev in0\nlink set in0 up",
        nested.name()
    ));
    nested.ip(
        "link set lo up\naddr add 172.31.0.2/24 dev out0\nlink set out0 up\nroute add default via 172.31.0.1",
    );
    pod.sysctl("ipv4/ip_forward", "1");
    nft(
        pod,
        &format!(
            "table ip nat {{
                chain post {{ type nat hook postrouting priority 100; oifname {interface} masquerade; }}
            }}"
        ),
    );
    nested
}

#[test]
fn netns_within_a_pod() {
    for link in [PodLink::Routed, PodLink::Bridged] {
        let env = TestEnv::new();
        let pod = env.add_pod(link);
        let nested = add_nested(&pod.netns, Pod::IFNAME);
        tcp_and_udp(env.vectors(&ALL), &nested).assert_blocked_all();
    }
}

/// Hooks that deny a namespace within a pod that has no interface of its own on the node. Only the pod forwards the
/// packets, not the node.
const WITHOUT_LINK: [&str; 2] = ["socket", "node_egress"];

fn assert_nested_netns_on_uplink_blocked(hooks: &[&'static str], kind: &str, options: &str) {
    if lacks_device(WHOLE_TEST, kind, &format!("link lower0 {options}")) {
        return;
    }
    let env = TestEnv::new();
    let pod = add_pod_on_uplink(&env, options);
    let nested = add_nested(&pod, "upper0");
    tcp_and_udp(env.vectors(hooks), &nested).assert_blocked_all();
}

#[test]
fn netns_within_a_macvlan_pod() {
    assert_nested_netns_on_uplink_blocked(&WITHOUT_LINK, "macvlan", "type macvlan mode bridge");
}

#[test]
fn netns_within_an_ipvlan_l2_pod() {
    assert_nested_netns_on_uplink_blocked(&WITHOUT_LINK, "ipvlan", "type ipvlan mode l2");
}

#[test]
fn netns_within_an_ipvlan_l3_pod() {
    assert_nested_netns_on_uplink_blocked(&["socket"], "ipvlan", "type ipvlan mode l3");
}

/// An ipvlan device in layer 3 mode moves packets out of the namespace and clears the fields that show that they were
/// forwarded.
#[test]
fn netns_within_ipvlan_l3_pod_node_egress() {
    assert_nested_netns_on_uplink_blocked(&["node_egress"], "ipvlan", "type ipvlan mode l3");
}

/// A second MAC address on the pod's own link.
#[test]
fn macvlan_within_a_pod() {
    if lacks_device(WHOLE_TEST, "macvlan", "link lower0 type macvlan mode bridge") {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Bridged);
    let nested = Netns::new("nested");
    pod.netns.ip(&format!(
        "link add mv0 link {} netns {} type macvlan mode bridge",
        Pod::IFNAME,
        nested.name()
    ));
    nested.ip(
        "link set lo up\naddr add 10.244.2.200/24 dev mv0\nlink set mv0 up\nroute add default via 10.244.2.1",
    );
    tcp_and_udp(env.vectors(&ALL), &nested).assert_blocked_all();
}
