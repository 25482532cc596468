//! Traffic that must keep working, with each hook alone and with all hooks.

use std::net::Ipv6Addr;

use imds_tests::{
    METADATA, METADATA_V6, Netns, Pod, PodLink, SERVICE, SERVICE_V6, TestEnv, known_here,
    probe::{LONG, SHORT, connect, http_exchange, http_get, icmp_echo, reachable, udp_echo},
};

use crate::{ALL, AWS};

/// Asserts that TCP and UDP over IPv6 reach `address`, as without an agent.
#[track_caller]
fn assert_v6_reaches(netns: &Netns, address: Ipv6Addr, who: &str) {
    assert!(reachable(netns, address), "{who} does not reach {address} by TCP");
    assert!(udp_echo(netns, address, LONG).is_answer(), "{who} does not reach {address} by UDP");
}

/// Asserts that the node's own access, other destinations, and traffic between pods and node work.
#[track_caller]
fn assert_nothing_is_harmed(env: &TestEnv, [routed, bridged]: &[Pod; 2]) {
    for pod in [routed, bridged] {
        env.assert_harmless(pod);
    }
    assert_v6_reaches(&env.node, METADATA_V6, "the node");
    assert_v6_reaches(&env.node, SERVICE_V6, "the node");
    assert_v6_reaches(&routed.netns, SERVICE_V6, "a pod");
    for (from, to) in [(routed, bridged), (bridged, routed)] {
        assert!(icmp_echo(&from.netns, to.address, LONG).is_answer(), "{} to {}", from.address, to.address);
    }
}

#[test]
fn other_traffic_passes_each_hook() {
    let env = TestEnv::new().with_ipv6();
    let pods = [PodLink::Routed, PodLink::Bridged].map(|link| env.add_pod(link));
    env.add_pod_ipv6(&pods[0]);
    assert_nothing_is_harmed(&env, &pods);
    assert!(reachable(&pods[0].netns, METADATA) && reachable(&pods[0].netns, METADATA_V6));
    let all = known_here(&ALL);
    for hooks in all.chunks(1).chain([&all[..]]) {
        eprintln!("hooks: {hooks:?}");
        let mut open_before = pods[0].netns.run(|| connect(SERVICE, LONG)).unwrap();
        let agent = env.agent().hooks(hooks).config(AWS).spawn_ready();
        // Flushes neighbour entries, so that ARP and neighbour discovery run again from both sides.
        for netns in [&*env.node, &pods[0].netns, &pods[1].netns, &env.fabric] {
            netns.ip("neigh flush all");
        }
        env.in_cgroup(|| {
            assert!(!http_get(&pods[0].netns, METADATA, SHORT).is_answer());
            assert!(!http_get(&pods[0].netns, METADATA_V6, SHORT).is_answer());
            assert_nothing_is_harmed(&env, &pods);
        });
        http_exchange(&mut open_before, LONG).unwrap();
        drop(agent);
        env.unload();
        assert!(reachable(&pods[0].netns, METADATA) && reachable(&pods[0].netns, METADATA_V6));
    }
}

/// Pods respond to other pods, to the node and to hosts outside.
#[test]
fn pods_are_reachable_with_both_tc_hooks() {
    let env = TestEnv::new();
    let pods = [PodLink::Routed, PodLink::Bridged].map(|link| env.add_pod(link));
    let _services = pods.each_ref().map(|pod| imds_tests::Services::start(&pod.netns, &[pod.address.into()]));
    let _agent = env.agent().hooks(&crate::TC_HOOKS).spawn_ready();
    for pod in &pods {
        for (netns, who) in [(&*env.node, "the node"), (&env.fabric, "the fabric"), (&pods[0].netns, "a pod")]
        {
            assert!(reachable(netns, pod.address), "{who} does not reach {}", pod.address);
        }
    }
}
