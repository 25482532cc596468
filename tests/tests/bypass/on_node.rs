//! A metadata service on the node itself, such as a proxy. Requests to it leave through no uplink.

use imds_tests::{
    METADATA, METADATA_V6, Netns, PacketSocket, Pod, PodLink, Services, TestEnv, packets,
    probe::{SHORT, http_get, reachable, udp_echo},
};

use crate::{
    ALL, AWS,
    links::{ATTEMPTS, add_ifb, lacks_ifb, send_by_ifb},
    services::{CLUSTER_IP, CLUSTER_IP_V6, redirect},
    source_route::{LOOSE, source_route},
    tunnels::{VXLAN, tunnel},
};

const HOOKS: [&str; 2] = ["from_pod", "socket"];
const LOCAL_SERVICE: &str = "local_service";

#[test]
fn local_service_direct() {
    let env = TestEnv::new().with_ipv6();
    let [routed, bridged] = [PodLink::Routed, PodLink::Bridged].map(|link| env.add_pod(link));
    env.add_pod_ipv6(&routed);
    env.node.ip(&format!("addr add {METADATA}/32 dev lo\naddr add {METADATA_V6}/128 dev lo nodad"));
    let _services = Services::start(&env.node, &[METADATA.into(), METADATA_V6.into()]);
    let mut vectors = env.vectors(&HOOKS).config(AWS);
    for pod in [&routed, &bridged] {
        vectors = vectors
            .vector("TCP", || http_get(&pod.netns, METADATA, SHORT).is_answer())
            .vector("UDP", || udp_echo(&pod.netns, METADATA, SHORT).is_answer());
    }
    vectors
        .vector("TCP over IPv6", || http_get(&routed.netns, METADATA_V6, SHORT).is_answer())
        .vector("UDP over IPv6", || udp_echo(&routed.netns, METADATA_V6, SHORT).is_answer())
        .assert_blocked_all();
}

/// Creates a node that has the metadata address itself, with a pod and the service.
fn env_with_service() -> (TestEnv, Pod, Services) {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    env.node.ip(&format!("addr add {METADATA}/32 dev lo"));
    // Outside of the cgroup, the service would receive packets that no hook sees.
    let services = env.in_cgroup(|| Services::start(&env.node, &[METADATA.into()]));
    (env, pod, services)
}

// Only the local_service hook sees packets whose destination becomes the node's own address after `from_pod`.

#[test]
fn local_service_behind_kube_service() {
    let (env, pod, _services) = env_with_service();
    redirect(&env.node, CLUSTER_IP, METADATA);
    env.vectors(&[])
        .also(LOCAL_SERVICE)
        .vector("TCP to a Service", || http_get(&pod.netns, CLUSTER_IP, SHORT).is_answer())
        .assert_blocked_all();
}

#[test]
fn local_service_behind_kube_service_over_ipv6() {
    let env = TestEnv::new().with_ipv6();
    let pod = env.add_pod(PodLink::Routed);
    env.add_pod_ipv6(&pod);
    env.node.ip(&format!("addr add {METADATA_V6}/128 dev lo nodad"));
    let _services = env.in_cgroup(|| Services::start(&env.node, &[METADATA_V6.into()]));
    redirect(&env.node, CLUSTER_IP_V6, METADATA_V6);
    env.vectors(&[])
        .also(LOCAL_SERVICE)
        .config(AWS)
        .vector("TCP to a Service", || http_get(&pod.netns, CLUSTER_IP_V6, SHORT).is_answer())
        .vector("UDP to a Service", || udp_echo(&pod.netns, CLUSTER_IP_V6, SHORT).is_answer())
        .assert_blocked_all();

    // No other hook sees the protected address, and the node's own requests pass.
    let by_service = |netns: &Netns| env.in_cgroup(|| http_get(netns, CLUSTER_IP_V6, SHORT).is_answer());
    for (hooks, expected) in [(&["from_pod"][..], true), (&["from_pod", LOCAL_SERVICE], false)] {
        let agent = env.agent().config(AWS).hooks(hooks).spawn_ready();
        assert_eq!(by_service(&pod.netns), expected, "{hooks:?}: {}", agent.log());
        assert!(by_service(&env.node), "{hooks:?}: {}", agent.log());
        assert!(env.in_cgroup(|| reachable(&env.node, METADATA_V6)), "{hooks:?}: {}", agent.log());
        drop(agent);
        env.unload();
    }
}

#[test]
fn local_service_through_tunnel() {
    let (env, pod, _services) = env_with_service();
    tunnel(&env, &pod, VXLAN);
    // Probed outside of the agent's cgroup, as with a packet socket, because the socket hook denies connect calls.
    let is_open = || http_get(&pod.netns, METADATA, SHORT).is_answer();
    assert!(is_open());
    let agent = env.agent().hooks(&[&ALL[..], &[LOCAL_SERVICE]].concat()).spawn_ready();
    assert!(!is_open());
    drop(agent);
    env.unload();
    assert!(is_open());
}

#[test]
fn local_service_by_source_route() {
    let (env, pod, _services) = env_with_service();
    for key in ["all", "default", &pod.host_ifname] {
        env.node.sysctl(&format!("ipv4/conf/{key}/accept_source_route"), "1");
    }
    let options = source_route(LOOSE, METADATA);
    let mut packet = packets::with_options(pod.address, env.node_address(), &options);
    // Truncated to a datagram to the echo port without a checksum.
    packet.truncate(packet.len() - 16);
    packet.extend_from_slice(&[[0x9c, 0x40], [0, 7], [0, 16], [0, 0]].concat());
    packet.extend_from_slice(b"a marker");
    let answer = [0, 7, 0x9c, 0x40, 0, 16];
    env.vectors(&[])
        .also(LOCAL_SERVICE)
        .vector("a loose source route", || {
            let socket = PacketSocket::frames(&pod.netns, Pod::IFNAME);
            socket.send(&packets::frame(&pod, &packet)).unwrap();
            socket.sees(&answer, SHORT)
        })
        .assert_blocked_all();
}

/// Packets from an ifb skip `from_pod`: see [`send_by_ifb`].
#[test]
fn a_metadata_service_on_the_node_by_an_ifb() {
    if lacks_ifb() {
        return;
    }
    let (env, pod, _services) = env_with_service();
    add_ifb(&pod.netns);
    let is_open = || {
        let socket = send_by_ifb(&pod.netns);
        socket.set_read_timeout(Some(SHORT)).expect("a timeout");
        socket.recv(&mut [0; 256]).is_ok()
    };
    // On a busy machine the packets can leave the ifb before the pod has deleted its filter.
    let is_open_soon = || (0..ATTEMPTS).any(|_| is_open());
    assert!(is_open_soon());
    for (hooks, expected) in [(&["from_pod"][..], true), (&["from_pod", LOCAL_SERVICE], false)] {
        let agent = env.agent().hooks(hooks).spawn_ready();
        let is_open = if expected { is_open_soon() } else { is_open() };
        assert_eq!(is_open, expected, "{hooks:?}: {}", agent.log());
        drop(agent);
        env.unload();
        assert!(is_open_soon(), "after {hooks:?}");
    }
}
