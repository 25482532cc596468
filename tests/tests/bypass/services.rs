//! Services and other rules of the node that translate an address into the endpoint's.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use imds_tests::{
    METADATA, METADATA_V6, Netns, Pod, PodLink, TestEnv, WHOLE_TEST, lacks_program,
    probe::{SHORT, http_get, reachable, udp_echo},
};

use crate::{AWS, TC_HOOKS};

pub(crate) const CLUSTER_IP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 80);
pub(crate) const CLUSTER_IP_V6: Ipv6Addr = Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, 0x80);

/// Redirects traffic for one address to the endpoint, as a Service does whose backend is the endpoint.
pub(crate) fn redirect(netns: &Netns, service: impl Into<IpAddr>, endpoint: impl Into<IpAddr>) {
    let (service, endpoint) = (service.into(), endpoint.into());
    let family = if service.is_ipv4() { "ip" } else { "ip6" };
    let rules = format!(
        "table {family} service {{
            chain prerouting {{ type nat hook prerouting priority -100; {family} daddr {service} dnat to {endpoint}; }}
            chain output {{ type nat hook output priority -100; {family} daddr {service} dnat to {endpoint}; }}
        }}"
    );
    nft(netns, &rules);
}

pub(crate) fn nft(netns: &Netns, rules: &str) {
    let mut command = netns.command("nft");
    command.arg(rules);
    let output = imds_tests::output(command);
    assert!(output.status.success(), "nft: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn service_with_endpoint_as_backend() {
    let env = TestEnv::new().with_ipv6();
    let [routed, bridged] = [PodLink::Routed, PodLink::Bridged].map(|link| env.add_pod(link));
    env.add_pod_ipv6(&routed);
    redirect(&env.node, CLUSTER_IP, METADATA);
    redirect(&env.node, CLUSTER_IP_V6, METADATA_V6);
    let mut vectors = env.vectors(&["node_egress"]).config(AWS);
    for pod in [&routed, &bridged] {
        vectors = vectors
            .vector("TCP to a Service", || http_get(&pod.netns, CLUSTER_IP, SHORT).is_answer())
            .vector("UDP to a Service", || udp_echo(&pod.netns, CLUSTER_IP, SHORT).is_answer());
    }
    vectors
        .vector("TCP to a Service over IPv6", || http_get(&routed.netns, CLUSTER_IP_V6, SHORT).is_answer())
        .vector("UDP to a Service over IPv6", || udp_echo(&routed.netns, CLUSTER_IP_V6, SHORT).is_answer())
        .assert_blocked_all();
}

#[test]
fn node_may_use_service_to_endpoint() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    redirect(&env.node, CLUSTER_IP, METADATA);
    let _agent = env.agent().hooks(&TC_HOOKS).spawn_ready();
    assert!(!http_get(&pod.netns, CLUSTER_IP, SHORT).is_answer());
    assert!(reachable(&env.node, CLUSTER_IP));
    env.assert_harmless(&pod);
}

/// `from_pod` sees the address of the Service, so that `node_egress` compares the source with the pod's addresses.
#[test]
fn routed_exempt_pod_behind_a_service() {
    if lacks_program(WHOLE_TEST, &["nft"]) {
        return;
    }
    let env = TestEnv::new();
    let [exempt, other] = [(); 2].map(|()| env.add_pod(PodLink::Routed));
    redirect(&env.node, CLUSTER_IP, METADATA);
    let gets = |pod: &Pod| http_get(&pod.netns, CLUSTER_IP, SHORT).is_answer();
    assert!(gets(&exempt) && gets(&other));
    let rule = format!("[[exempt]]\nname = 'reader'\ninterface = '{}'", exempt.host_ifname);
    let agent = env.agent().hooks(&["from_pod", "node_egress"]).config(&rule).spawn_ready();
    assert!(gets(&exempt) && !gets(&other));
    drop(agent);
    env.unload();
    assert!(gets(&other));
}

/// The exempt pod forwards requests of another network namespace, in which `from_pod` sees the address of a Service.
#[test]
fn exempt_pod_forwards_to_a_service() {
    if lacks_program(WHOLE_TEST, &["nft"]) {
        return;
    }
    let env = TestEnv::new();
    let exempt = env.add_pod(PodLink::Routed);
    let behind = Netns::new("behind");
    exempt.netns.sysctl("ipv4/ip_forward", "1");
    exempt.netns.ip(&format!(
        "link add inner0 type veth peer name eth0 netns {}
         addr add 10.99.0.1/24 dev inner0
         link set inner0 up",
        behind.name()
    ));
    behind.ip("addr add 10.99.0.2/24 dev eth0
         link set eth0 up
         route add default via 10.99.0.1");
    env.node.ip(&format!("route add 10.99.0.0/24 via {} dev {} onlink", exempt.address, exempt.host_ifname));
    env.fabric.ip(&format!("route add 10.99.0.0/24 via {}", env.node_address()));
    redirect(&env.node, CLUSTER_IP, METADATA);
    let gets = |netns: &Netns, address| http_get(netns, address, SHORT).is_answer();
    assert!(gets(&behind, CLUSTER_IP));
    let rule = format!("[[exempt]]\nname = 'reader'\ninterface = '{}'", exempt.host_ifname);
    let agent = env.agent().hooks(&TC_HOOKS).config(&rule).spawn_ready();
    // A direct request of the exempt pod, after which its packets need no other check for some seconds.
    assert!(gets(&exempt.netns, METADATA));
    assert!(!gets(&behind, CLUSTER_IP) && !gets(&behind, METADATA));
    drop(agent);
    env.unload();
    assert!(gets(&behind, CLUSTER_IP));
}
