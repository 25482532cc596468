//! Tunnels from a pod that end on the node, as in overlay networks. Decapsulated packets are addressed to the endpoint,
//! which no pod interface saw before.

use imds_tests::{
    METADATA, METADATA_V6, Netns, Pod, PodLink, TestEnv, WHOLE_TEST, lacks_device,
    probe::{SHORT, http_get, udp_echo},
};

use crate::AWS;

/// Hooks that deny tunneled traffic: `node_egress` denies any inner packet, the socket hook those that a socket sends.
const HOOKS: [&str; 2] = ["node_egress", "socket"];

pub(crate) const VXLAN: &str = "type vxlan id 42 local LOCAL remote REMOTE dstport 4789";

/// Adds a tunnel device at both ends, and the route through it.
pub(crate) fn tunnel(env: &TestEnv, pod: &Pod, options: &str) {
    let end = |netns: &Netns, local, remote, address| {
        let options = options.replace("LOCAL", local).replace("REMOTE", remote);
        netns.ip(&format!(
            "link add tunnel0 {options}\naddr add {address}/24 dev tunnel0\nlink set tunnel0 up"
        ));
    };
    let (node, inside) = (env.node_address().to_string(), pod.address.to_string());
    end(&env.node, &node, &inside, "172.30.0.1");
    end(&pod.netns, &inside, &node, "172.30.0.2");
    pod.netns.ip(&format!("route add {METADATA} via 172.30.0.1 dev tunnel0"));
    env.fabric.ip(&format!("route add 172.30.0.0/24 via {node}"));
}

/// Asserts that tunneled packets of the pod are denied.
fn assert_tunnel_blocked(kind: &str, options: &str) {
    let example = options.replace("LOCAL", "10.0.0.4").replace("REMOTE", "10.0.0.5");
    if lacks_device(WHOLE_TEST, kind, &example) {
        return;
    }
    for link in [PodLink::Routed, PodLink::Bridged] {
        let env = TestEnv::new();
        let pod = env.add_pod(link);
        if link == PodLink::Bridged {
            // Otherwise the node sends from the bridge's address, which is not the pod's configured remote address.
            let (pod, node) = (pod.address, env.node_address());
            env.node.ip(&format!("route add {pod}/32 dev {} src {node}", TestEnv::BRIDGE));
        }
        tunnel(&env, &pod, options);
        env.vectors(&HOOKS)
            .vector(format!("TCP in {kind}"), || http_get(&pod.netns, METADATA, SHORT).is_answer())
            .vector(format!("UDP in {kind}"), || udp_echo(&pod.netns, METADATA, SHORT).is_answer())
            .assert_blocked_all();
    }
}

#[test]
fn vxlan() {
    assert_tunnel_blocked("VXLAN", VXLAN);
}

#[test]
fn geneve() {
    assert_tunnel_blocked("Geneve", "type geneve id 42 remote REMOTE");
}

#[test]
fn ipip() {
    assert_tunnel_blocked("IPIP", "type ipip local LOCAL remote REMOTE");
}

#[test]
fn gre() {
    assert_tunnel_blocked("GRE", "type gre local LOCAL remote REMOTE");
}

#[test]
fn gre_with_ethernet() {
    assert_tunnel_blocked("GRE TAP", "type gretap local LOCAL remote REMOTE");
}

/// A `sit` device carries IPv4 too.
#[test]
fn sit_with_ipv4() {
    assert_tunnel_blocked("SIT", "type sit mode any local LOCAL remote REMOTE");
}

/// Asserts that IPv6 packets in a tunnel over IPv4 are denied.
fn assert_ipv6_in_tunnel_blocked(kind: &str, options: &str) {
    let example = options.replace("LOCAL", "10.0.0.4").replace("REMOTE", "10.0.0.5");
    if lacks_device(WHOLE_TEST, kind, &example) {
        return;
    }
    let env = TestEnv::new().with_ipv6();
    let pod = env.add_pod(PodLink::Routed);
    env.add_pod_ipv6(&pod);
    tunnel(&env, &pod, options);
    env.node.ip("addr add fd30::1/64 dev tunnel0 nodad");
    pod.netns.ip(&format!(
        "addr add fd30::2/64 dev tunnel0 nodad\nroute add {METADATA_V6} via fd30::1 dev tunnel0 src fd30::2"
    ));
    env.fabric.ip(&format!("route add fd30::/64 via {}", env.node_address_v6()));
    env.vectors(&HOOKS)
        .config(AWS)
        .vector(format!("TCP over IPv6 in {kind}"), || http_get(&pod.netns, METADATA_V6, SHORT).is_answer())
        .vector(format!("UDP over IPv6 in {kind}"), || udp_echo(&pod.netns, METADATA_V6, SHORT).is_answer())
        .assert_blocked_all();
}

#[test]
fn vxlan_with_ipv6() {
    assert_ipv6_in_tunnel_blocked("VXLAN", VXLAN);
}

#[test]
fn sit_with_ipv6() {
    assert_ipv6_in_tunnel_blocked("SIT", "type sit mode any local LOCAL remote REMOTE");
}
