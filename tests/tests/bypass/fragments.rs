//! Fragments and allowed ports: fragments whose port is unknown, and fragments that overwrite the port, are denied.

use imds_tests::{METADATA, PacketSocket, Pod, PodLink, TestEnv, packets};

use crate::TC_HOOKS;

const TCP: u8 = 6;
const UDP: u8 = 17;
const KEEP_DNS: &str = "provider = 'none'
    [[endpoint]]
    name = 'imds'
    address = '169.254.169.254'
    allow_ports = ['udp/53', 'tcp/53']";

/// Builds the header of a UDP datagram of 24 bytes from port 40000 to `port`. The wrong checksum avoids a reply, which
/// would make the pod send more packets.
fn udp_header(port: u8) -> [u8; 8] {
    [0x9c, 0x40, 0, port, 0, 24, 0xde, 0xad]
}

/// A fragment: protocol, offset in units of eight bytes, more-fragments flag, and payload.
type Fragment = (u8, u16, bool, Vec<u8>);

/// Returns fragmented datagrams and segments, each with the number of fragments that may pass if port 53 is allowed.
fn sets() -> Vec<(&'static str, Vec<Fragment>, usize)> {
    let dns = udp_header(53).to_vec();
    let http = udp_header(80).to_vec();
    let rest = vec![0; 16];
    vec![
        (
            "the first fragment to a port that is not allowed",
            vec![(UDP, 0, true, http.clone()), (UDP, 1, false, rest.clone())],
            0,
        ),
        (
            "the rest of a datagram to an allowed port",
            vec![(UDP, 0, true, dns.clone()), (UDP, 1, false, rest.clone())],
            1,
        ),
        (
            "a second first fragment with another port",
            vec![(UDP, 0, true, dns.clone()), (UDP, 0, true, http.clone()), (UDP, 1, false, rest)],
            1,
        ),
        (
            "a fragment that overlaps the allowed port",
            vec![(UDP, 0, true, [dns, vec![0; 8]].concat()), (UDP, 1, false, http)],
            1,
        ),
        // Eight bytes of TCP contain the ports, but not the rest of the header.
        (
            "a tiny first fragment, and the rest of the header",
            vec![(TCP, 0, true, vec![0x9c, 0x40, 0, 80, 0, 0, 0, 1]), (TCP, 1, false, vec![0; 12])],
            0,
        ),
        ("the rest of a header to an allowed port", vec![(TCP, 1, false, vec![0; 12])], 0),
        ("a first fragment that ends before the port", vec![(UDP, 0, false, vec![0x9c, 0x40])], 0),
    ]
}

#[test]
fn fragments_reach_allowed_ports_only() {
    let env = TestEnv::new();
    let pods = [PodLink::Routed, PodLink::Bridged].map(|link| env.add_pod(link));
    let arrivals_of = |pod: &Pod, fragments: &[Fragment]| {
        let socket = PacketSocket::frames(&pod.netns, Pod::IFNAME);
        let before = env.received_packets().from(pod.address);
        for (protocol, offset, more, content) in fragments {
            let packet = packets::fragment_with(pod.address, METADATA, *protocol, *offset, *more, content);
            socket.send(&packets::frame(pod, &packet)).unwrap();
        }
        env.received_packets().from(pod.address) - before
    };
    let assert_open = || {
        for (pod, (name, fragments, _)) in
            pods.iter().flat_map(|pod| sets().into_iter().map(move |set| (pod, set)))
        {
            let sent = u64::try_from(fragments.len()).unwrap();
            assert_eq!(arrivals_of(pod, &fragments), sent, "{name}, without the agent");
        }
    };
    assert_open();
    for hooks in [&TC_HOOKS[..1], &TC_HOOKS[1..], &TC_HOOKS] {
        let agent = env.agent().hooks(hooks).config(KEEP_DNS).spawn_ready();
        for pod in &pods {
            for (name, fragments, allowed) in sets() {
                let allowed = u64::try_from(allowed).unwrap();
                assert_eq!(arrivals_of(pod, &fragments), allowed, "{name}, with {hooks:?}");
            }
        }
        drop(agent);
        env.unload();
        assert_open();
    }
}
