//! Packets to the node that name their next destination: IPv4 source routes and IPv6 segments. `from_pod` sees another
//! destination. If the node follows source routes, it forwards them to the endpoint.

use std::{net::Ipv4Addr, os::fd::AsRawFd as _};

use imds_tests::{METADATA, METADATA_V6, PacketSocket, Pod, PodLink, TestEnv, packets, probe::SHORT};

use crate::AWS;

const NO_OPERATION: u8 = 1;
pub(crate) const LOOSE: u8 = 0x83;
const STRICT: u8 = 0x89;

/// Returns a source route option with one remaining address.
pub(crate) fn source_route(kind: u8, last: Ipv4Addr) -> Vec<u8> {
    [&[NO_OPERATION, kind, 7, 4][..], &last.octets()].concat()
}

#[test]
fn source_routes_followed_by_the_node() {
    let env = TestEnv::new();
    let pods = [PodLink::Routed, PodLink::Bridged].map(|link| env.add_pod(link));
    for key in ["all", "default", TestEnv::BRIDGE, &pods[0].host_ifname] {
        env.node.sysctl(&format!("ipv4/conf/{key}/accept_source_route"), "1");
    }
    // The next hop of a strict route must be a neighbour.
    env.node.ip(&format!("route add {METADATA} dev {}", TestEnv::UPLINK));
    let mut vectors = env.vectors(&["node_egress"]);
    for (pod, link) in pods.iter().zip(["routed", "bridged"]) {
        for (kind, name) in [(LOOSE, "loose"), (STRICT, "strict")] {
            let (env, options) = (&env, source_route(kind, METADATA));
            vectors = vectors.one_vector(format!("a {name} source route, {link}"), move || {
                let packet = packets::with_options(pod.address, env.node_address(), &options);
                let frame = packets::frame(pod, &packet);
                PacketSocket::frames(&pod.netns, Pod::IFNAME).send(&frame).unwrap();
            });
        }
    }
    vectors.assert_blocked_all();
}

/// Needs no privilege: the packets go to the first hop, while the call names the last one.
#[test]
fn socket_with_source_route_via_node() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    for key in ["all", "default", &pod.host_ifname] {
        env.node.sysctl(&format!("ipv4/conf/{key}/accept_source_route"), "1");
    }
    let send = || {
        let socket = pod.netns.run(|| std::net::UdpSocket::bind("0.0.0.0:0")).unwrap();
        socket.set_write_timeout(Some(SHORT)).unwrap();
        let route = source_route(LOOSE, env.node_address());
        let length = libc::socklen_t::try_from(route.len()).unwrap();
        // SAFETY: the length is the size of the option, which outlives the call.
        let result = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::IPPROTO_IP,
                libc::IP_OPTIONS,
                route.as_ptr().cast(),
                length,
            )
        };
        assert_eq!(result, 0, "IP_OPTIONS: {}", std::io::Error::last_os_error());
        // The socket hook denies the call if it is on.
        let _ = socket.send_to(b"routed", (METADATA, 9999));
    };
    env.vectors(&["socket", "node_egress"])
        .one_vector("a loose source route of a socket", send)
        .assert_blocked_all();
}

#[test]
fn srv6_segments_followed_by_the_node() {
    const ROUTING: u8 = 43;
    const SEGMENT_ROUTING: u8 = 4;
    const NO_NEXT: u8 = 59;
    let env = TestEnv::new().with_ipv6();
    let pod = env.add_pod(PodLink::Routed);
    let address = env.add_pod_ipv6(&pod);
    let node = env.node_address_v6();
    for key in ["all", "default", &pod.host_ifname] {
        if !env.node.has_sysctl(&format!("ipv6/conf/{key}/seg6_enabled")) {
            imds_tests::skip(imds_tests::WHOLE_TEST, "no segment routing on this kernel");
            return;
        }
        env.node.sysctl(&format!("ipv6/conf/{key}/seg6_enabled"), "1");
    }
    // Two segments in reverse order: the node is first, the endpoint last.
    let header =
        [&[NO_NEXT, 4, SEGMENT_ROUTING, 1, 1, 0, 0, 0][..], &METADATA_V6.octets(), &node.octets()].concat();
    let packet = packets::ipv6(address, node, ROUTING, &header);
    env.vectors(&["node_egress"])
        .config(AWS)
        .one_vector("segments", || {
            PacketSocket::frames(&pod.netns, Pod::IFNAME).send(&packets::frame(&pod, &packet)).unwrap();
        })
        .assert_blocked_all();
}
