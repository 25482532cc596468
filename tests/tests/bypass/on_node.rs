//! A metadata service on the node itself, such as a proxy. Requests to it leave through no uplink.

use imds_tests::{
    METADATA, METADATA_V6, PacketSocket, Pod, PodLink, Services, World, packets,
    probe::{SHORT, http_get, udp_echo},
};

use crate::{
    ALL, AWS,
    services::{CLUSTER_IP, redirect},
    source_route::{LOOSE, source_route},
    tunnels::{VXLAN, tunnel},
};

const HOOKS: [&str; 2] = ["from_pod", "socket"];
const LOCAL_SERVICE: &str = "local_service";

#[test]
fn local_service_direct() {
    let world = World::new().with_ipv6();
    let [routed, bridged] = [PodLink::Routed, PodLink::Bridged].map(|link| world.add_pod(link));
    world.add_pod_ipv6(&routed);
    world.node.ip(&format!("addr add {METADATA}/32 dev lo\naddr add {METADATA_V6}/128 dev lo nodad"));
    let _services = Services::start(&world.node, &[METADATA.into(), METADATA_V6.into()]);
    let mut ways = world.ways(&HOOKS).config(AWS);
    for pod in [&routed, &bridged] {
        ways = ways
            .way("TCP", || http_get(&pod.netns, METADATA, SHORT).is_answer())
            .way("UDP", || udp_echo(&pod.netns, METADATA, SHORT).is_answer());
    }
    ways.way("TCP over IPv6", || http_get(&routed.netns, METADATA_V6, SHORT).is_answer())
        .way("UDP over IPv6", || udp_echo(&routed.netns, METADATA_V6, SHORT).is_answer())
        .assert_held();
}

/// Creates a node that has the metadata address itself, with a pod and the service.
fn world_with_service() -> (World, Pod, Services) {
    let world = World::new();
    let pod = world.add_pod(PodLink::Routed);
    world.node.ip(&format!("addr add {METADATA}/32 dev lo"));
    // Outside of the cgroup, the service would receive packets that no hook sees.
    let services = world.in_cgroup(|| Services::start(&world.node, &[METADATA.into()]));
    (world, pod, services)
}

// Only the local_service hook sees packets whose destination becomes the node's own address after `from_pod`.

#[test]
fn local_service_behind_kube_service() {
    let (world, pod, _services) = world_with_service();
    redirect(&world.node, CLUSTER_IP, METADATA);
    world
        .ways(&[])
        .also(LOCAL_SERVICE)
        .way("TCP to a Service", || http_get(&pod.netns, CLUSTER_IP, SHORT).is_answer())
        .assert_held();
}

#[test]
fn local_service_through_tunnel() {
    let (world, pod, _services) = world_with_service();
    tunnel(&world, &pod, VXLAN);
    // Probed outside of the agent's cgroup, as with a packet socket, because the socket hook denies connect calls.
    let is_open = || http_get(&pod.netns, METADATA, SHORT).is_answer();
    assert!(is_open());
    let agent = world.agent().hooks(&[&ALL[..], &[LOCAL_SERVICE]].concat()).spawn_ready();
    assert!(!is_open());
    drop(agent);
    world.unload();
    assert!(is_open());
}

#[test]
fn local_service_by_source_route() {
    let (world, pod, _services) = world_with_service();
    for key in ["all", "default", &pod.host_ifname] {
        world.node.sysctl(&format!("ipv4/conf/{key}/accept_source_route"), "1");
    }
    let options = source_route(LOOSE, METADATA);
    let mut packet = packets::with_options(pod.address, world.node_address(), &options);
    // Truncated to a datagram to the echo port without a checksum.
    packet.truncate(packet.len() - 16);
    packet.extend_from_slice(&[[0x9c, 0x40], [0, 7], [0, 16], [0, 0]].concat());
    packet.extend_from_slice(b"a marker");
    let answer = [0, 7, 0x9c, 0x40, 0, 16];
    world
        .ways(&[])
        .also(LOCAL_SERVICE)
        .way("a loose source route", || {
            let socket = PacketSocket::frames(&pod.netns, Pod::IFNAME);
            socket.send(&packets::frame(&pod, &packet)).unwrap();
            socket.sees(&answer, SHORT)
        })
        .assert_held();
}
