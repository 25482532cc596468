//! Traffic that the hook must not deny.

use std::net::IpAddr;

use aya::util::KernelVersion;
use imds_tests::{
    DNS_ALLOWED, DNS_PORT, METADATA, METADATA_V6, Netns, PodLink, SERVICE, SERVICE_V6, TestEnv,
    probe::{LONG, SHORT, http_get, http_get_at, icmp_echo, reachable, udp_echo, udp_echo_at},
    skip, skip_without_netns_cookie,
};

use crate::{ALL, CONTAINER, HOST_NETWORK, host_links, is_denied, send_raw};

/// Asserts that unprotected traffic of a process on the node works.
fn assert_reaches(netns: &Netns, addresses: &[IpAddr]) {
    for &address in addresses {
        assert!(reachable(netns, address), "TCP to {address}");
        assert!(udp_echo(netns, address, LONG).is_answer(), "UDP to {address}");
        if let IpAddr::V4(address) = address {
            assert!(icmp_echo(netns, address, LONG).is_answer(), "ICMP to {address}");
        }
    }
}

#[test]
fn node_and_unprotected_addresses_pass() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new().with_ipv6();
    let container = env.add_cgroup(CONTAINER);
    let kubelet = env.add_cgroup("system.slice/kubelet.service");
    let agent = env.agent().hooks(&ALL).config(DNS_ALLOWED).spawn_ready();
    let services = [SERVICE.into(), SERVICE_V6.into()];
    let endpoints = [METADATA.into(), METADATA_V6.into()];
    assert_reaches(&env.node, &[&services[..], &endpoints].concat());
    kubelet.run(|| assert_reaches(&env.node, &[&services[..], &endpoints].concat()));
    container.run(|| {
        assert_reaches(&env.node, &services);
        for endpoint in endpoints {
            let dns = (endpoint, DNS_PORT).into();
            assert!(http_get_at(&env.node, dns, LONG).is_answer(), "TCP to {dns}");
            assert!(udp_echo_at(&env.node, dns, LONG).is_answer(), "UDP to {dns}");
            assert!(!http_get(&env.node, endpoint, SHORT).is_answer(), "TCP to {endpoint}");
            assert!(!udp_echo(&env.node, endpoint, SHORT).is_answer(), "UDP to {endpoint}");
        }
    });
    let status = env.status();
    assert_eq!((status.state.as_str(), &status.hooks[..]), ("enforcing", &ALL.map(str::to_owned)[..]));
    let counts = status.host_network.expect("host_network is on").counts;
    assert!(counts.allowed.packets > 0 && counts.denied.packets == 4, "{counts:?}");
    drop(agent);
    env.unload();
    container.run(|| assert_reaches(&env.node, &endpoints));
}

#[test]
fn pod_with_own_netns_is_counted_once() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let container = env.add_cgroup(CONTAINER);
    assert!(container.run(|| reachable(&pod.netns, METADATA)));
    let agent = env.agent().hooks(&ALL).spawn_ready();
    let denied = || {
        let status = env.status();
        let sockets = status.sockets.as_ref().expect("the hook is on").counts;
        let host = status.host_network.as_ref().expect("host_network is on").counts;
        let from_pod = status.interface(&pod.host_ifname).counts;
        [from_pod, sockets, host, status.total].map(|counts| counts.denied.packets)
    };
    assert!(container.run(|| !http_get(&pod.netns, METADATA, SHORT).is_answer()));
    assert_eq!(denied(), [0, 1, 0, 1]);
    if KernelVersion::current().unwrap() < KernelVersion::new(6, 15, 0) {
        skip("packets", "programs of cgroups do not see a socket's network namespace on this kernel");
    } else {
        container.run(|| send_raw(&pod.netns, METADATA, 132)).unwrap();
        env.status_when("the packet is counted", |status| status.total.denied.packets == 2);
        assert_eq!(denied(), [1, 1, 0, 2]);
    }
    // Calls and packets in the node's namespace are denied too.
    assert!(container.run(|| !http_get(&env.node, METADATA, SHORT).is_answer()));
    assert!(is_denied(container.run(|| send_raw(&env.node, METADATA, 132))));
    let [_, _, host, _] = denied();
    assert_eq!(host, 2);
    drop(agent);
    env.unload();
    assert!(container.run(|| reachable(&pod.netns, METADATA)));
}

#[test]
fn disabled_host_network_denies_nothing() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let container = env.add_cgroup(CONTAINER);
    let is_open = || container.run(|| reachable(&env.node, METADATA));
    let is_blocked = || container.run(|| !http_get(&env.node, METADATA, SHORT).is_answer());
    let agent = env.agent().hooks(&ALL[..3]).spawn_ready();
    assert!(is_open());
    assert!(env.status().host_network.is_none());
    agent.kill9();
    let agent = env.agent().hooks(&ALL).spawn_ready();
    assert!(is_blocked());
    agent.kill9();
    assert!(is_blocked());
    // The next agent has the hook off and removes its links.
    let agent = env.agent().hooks(&ALL[..3]).spawn_ready();
    assert!(is_open());
    assert_eq!(host_links(&env), [""; 0]);
    agent.kill9();
    // The mode `off` disables the hook as well.
    let agent = env.agent().hooks(&[HOST_NETWORK]).config("mode = 'off'").spawn_ready();
    assert!(is_open());
    drop(agent);
    env.unload();
    assert!(is_open());
}

#[test]
fn audit_counts_and_passes() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let container = env.add_cgroup(CONTAINER);
    let _agent = env.agent().hooks(&[HOST_NETWORK]).config("mode = 'audit'").spawn_ready();
    let before = env.received_packets();
    container.run(|| send_raw(&env.node, METADATA, 132)).unwrap();
    assert_eq!(env.received_packets().total(), before.total() + 1);
    let counts = || env.status().host_network.expect("host_network is on").counts;
    assert_eq!((counts().audited.packets, counts().denied.packets), (1, 0));
    assert!(container.run(|| reachable(&env.node, METADATA)));
    assert!(counts().audited.packets > 2 && counts().denied.packets == 0, "{:?}", counts());
}
