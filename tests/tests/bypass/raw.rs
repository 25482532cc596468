//! Packets of any protocol from raw sockets, which pods may open by default.

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    os::fd::AsRawFd as _,
};

use imds_tests::{
    AttackVectors, METADATA, Netns, PacketSocket, Pod, PodLink, TestEnv, packets,
    probe::{SHORT, icmp_echo, send_ipv4},
};
use nix::sys::socket::{MsgFlags, SockaddrIn, sendto};

use crate::{TC_HOOKS, calls::socket};

/// Sends a packet from a raw socket. The kernel adds the IP header.
fn send_protocol(netns: &Netns, to: Ipv4Addr, protocol: libc::c_int) {
    let socket = socket(netns, libc::SOCK_RAW, protocol).expect("a raw socket");
    let to = SockaddrIn::from(SocketAddrV4::new(to, 0));
    sendto(socket.as_raw_fd(), &[0, 7, 0, 7, 0, 16, 0, 0], &to, MsgFlags::empty()).expect("send a packet");
}

/// Adds the packets that a raw socket can send.
pub(crate) fn vectors<'w>(mut vectors: AttackVectors<'w>, pod: &'w Pod) -> AttackVectors<'w> {
    let protocols = [
        ("TCP", libc::IPPROTO_TCP),
        ("UDP", libc::IPPROTO_UDP),
        ("IGMP", libc::IPPROTO_IGMP),
        ("IPIP", libc::IPPROTO_IPIP),
        ("DCCP", libc::IPPROTO_DCCP),
        ("GRE", libc::IPPROTO_GRE),
        ("ESP", libc::IPPROTO_ESP),
        ("SCTP", libc::IPPROTO_SCTP),
        ("UDP-Lite", libc::IPPROTO_UDPLITE),
        ("an experiment", 253),
    ];
    for (name, protocol) in protocols {
        vectors = vectors
            .one_vector(format!("{name} from a raw socket"), move || {
                send_protocol(&pod.netns, METADATA, protocol);
            })
            .one_vector(format!("{name} with IP_HDRINCL"), move || {
                let protocol = protocol.try_into().expect("eight bits");
                let packet = packets::protocol(pod.address, METADATA, protocol);
                send_ipv4(&pod.netns, METADATA, &[packet]).expect("send a packet");
            });
    }
    vectors.vector("ICMP echo", || icmp_echo(&pod.netns, METADATA, SHORT).is_answer()).one_vector(
        "a packet socket that bypasses the queue",
        || {
            let socket = PacketSocket::frames(&pod.netns, Pod::IFNAME);
            socket.bypass_queue();
            let packet = packets::udp(pod.address, METADATA, b"bypass");
            socket.send(&packets::frame(pod, &packet)).expect("send a frame");
        },
    )
}

#[test]
fn any_protocol_from_raw_socket() {
    for link in [PodLink::Routed, PodLink::Bridged] {
        let env = TestEnv::new();
        let pod = env.add_pod(link);
        vectors(env.vectors(&TC_HOOKS), &pod).assert_blocked_all();
    }
}
