//! IPv6 endpoints, and IPv6 addresses that embed the endpoint's IPv4 address.

use std::net::{Ipv6Addr, SocketAddr, UdpSocket};

use imds_tests::{
    AttackVectors, METADATA_V6, PacketSocket, Pod, PodLink, TestEnv, packets,
    probe::{SHORT, http_get, udp_echo},
};

use crate::{ALL, AWS, TC_HOOKS};

const HOP_BY_HOP: u8 = 0;
const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
const ROUTING: u8 = 43;
pub(crate) const FRAGMENT: u8 = 44;
const ESP: u8 = 50;
const AUTHENTICATION: u8 = 51;
const ICMP: u8 = 58;
const NO_NEXT: u8 = 59;
const DESTINATION: u8 = 60;
const SCTP: u8 = 132;
const MOBILITY: u8 = 135;

pub(crate) fn send(pod: &Pod, packet: &[u8]) {
    PacketSocket::frames(&pod.netns, Pod::IFNAME).send(&packets::frame(pod, packet)).expect("send a frame");
}

/// Returns extension headers before a UDP header: the type of the first one and all bytes.
fn headers() -> Vec<(&'static str, u8, Vec<u8>)> {
    // Contents after the first byte, which is the type of the next header. Padded if necessary.
    let options = |next: u8| [&[next, 0, 1, 4][..], &[0; 4]].concat();
    let fragment = |offset: u16, more: u8| {
        let [high, low] = (offset << 3 | u16::from(more)).to_be_bytes();
        vec![UDP, 0, high, low, 0, 0, 0x1b, 0x4d]
    };
    let routing = |kind: u8| [&[UDP, 2, kind, 0][..], &[0; 20]].concat();
    vec![
        ("none", UDP, Vec::new()),
        ("hop-by-hop options", HOP_BY_HOP, options(UDP)),
        ("destination options", DESTINATION, options(UDP)),
        (
            "destination options, many times",
            DESTINATION,
            [vec![options(DESTINATION); 9].concat(), options(UDP)].concat(),
        ),
        ("an atomic fragment", FRAGMENT, fragment(0, 0)),
        ("a first fragment", FRAGMENT, fragment(0, 1)),
        ("a fragment in the middle", FRAGMENT, fragment(2, 1)),
        ("a last fragment", FRAGMENT, fragment(8000, 0)),
        ("options and a fragment", DESTINATION, [options(FRAGMENT), fragment(0, 1)].concat()),
        ("a used-up route of type 0", ROUTING, routing(0)),
        ("a used-up route of type 2", ROUTING, routing(2)),
        ("a used-up route of type 4", ROUTING, routing(4)),
        ("authentication", AUTHENTICATION, [&[UDP, 4, 0, 0][..], &[0; 20]].concat()),
        ("encryption", ESP, vec![0; 16]),
        ("mobility", MOBILITY, options(UDP)),
        ("no next header", NO_NEXT, Vec::new()),
        ("SCTP", SCTP, vec![0; 12]),
        ("TCP", TCP, vec![0; 20]),
        ("ICMP", ICMP, vec![128, 0, 0, 0]),
        ("an experiment", 253, Vec::new()),
    ]
}

/// Adds socket calls, and packets with every extension header.
pub(crate) fn packets_to_endpoint<'w>(
    mut vectors: AttackVectors<'w>,
    pod: &'w Pod,
    address: Ipv6Addr,
) -> AttackVectors<'w> {
    for (name, first, content) in headers() {
        let packet = packets::ipv6(address, METADATA_V6, first, &[content, vec![0; 24]].concat());
        vectors = vectors.one_vector(format!("IPv6 with {name}"), move || send(pod, &packet));
    }
    vectors
}

#[test]
fn sockets_to_an_ipv6_endpoint() {
    let env = TestEnv::new().with_ipv6();
    let pod = env.add_pod(PodLink::Routed);
    env.add_pod_ipv6(&pod);
    env.vectors(&ALL)
        .config(AWS)
        .vector("TCP", || http_get(&pod.netns, METADATA_V6, SHORT).is_answer())
        .vector("UDP, connected", || udp_echo(&pod.netns, METADATA_V6, SHORT).is_answer())
        .vector("UDP by sendto", || {
            let socket = pod.netns.run(|| UdpSocket::bind("[::]:0")).unwrap();
            socket.set_read_timeout(Some(SHORT)).unwrap();
            let sent = socket.send_to(b"echo", SocketAddr::from((METADATA_V6, 7)));
            sent.and_then(|_| socket.recv(&mut [0; 16])).is_ok()
        })
        .assert_blocked_all();
}

#[test]
fn ipv6_extension_headers() {
    let env = TestEnv::new().with_ipv6();
    let pod = env.add_pod(PodLink::Routed);
    let address = env.add_pod_ipv6(&pod);
    packets_to_endpoint(env.vectors(&TC_HOOKS).config(AWS), &pod, address).assert_blocked_all();
}

#[test]
fn addresses_that_embed_the_endpoint() {
    let env = TestEnv::new().with_ipv6();
    let pod = env.add_pod(PodLink::Routed);
    let address = env.add_pod_ipv6(&pod);
    let mut vectors = env.vectors(&TC_HOOKS);
    for form in ["64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::1", "2002:a9fe:a9fe:7::9"] {
        let destination: Ipv6Addr = form.parse().unwrap();
        let packet = packets::udp_v6(address, destination, b"embedded");
        let pod = &pod;
        vectors = vectors.one_vector(form, move || send(pod, &packet)).one_vector(
            format!("{form} from a socket"),
            move || {
                let socket = pod.netns.run(|| UdpSocket::bind("[::]:0")).unwrap();
                let _ = socket.send_to(b"embedded", (destination, 9999));
            },
        );
    }
    vectors.assert_blocked_all();
}
