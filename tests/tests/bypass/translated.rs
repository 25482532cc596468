//! A node that translates IPv6 to IPv4 itself (NAT64, RFC 6146). Packets from the translator are addressed to the
//! endpoint, whatever the prefix was.

use std::{
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, Ipv6Addr, UdpSocket},
    os::fd::AsFd as _,
    thread::{self, JoinHandle},
};

use imds_tests::{METADATA, Netns, PodLink, TestEnv, TunMode, open_tun, packets};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::TC_HOOKS;

const SOURCE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 64);
const IPV6_HEADER: usize = 40;
const UDP_HEADER: usize = 8;

/// A translator of UDP with one prefix and a TUN device, as tayga.
struct Translator {
    stop: Option<io::PipeWriter>,
    thread: Option<JoinHandle<()>>,
}

impl Translator {
    fn start(node: &Netns) -> Self {
        let mut device = open_tun(node, "nat64", TunMode::Tun);
        node.ip("link set nat64 up");
        let (stopped, stop) = io::pipe().unwrap();
        let thread = thread::spawn(move || {
            let mut packet = [0; 2048];
            loop {
                let fds = [device.as_fd(), stopped.as_fd()];
                let mut fds = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN));
                poll(&mut fds, PollTimeout::NONE).unwrap();
                if fds[1].any() == Some(true) {
                    return;
                }
                let length = device.read(&mut packet).unwrap();
                if let Some(translated) = translate(&packet[..length]) {
                    device.write_all(&translated).unwrap();
                }
            }
        });
        Self { stop: Some(stop), thread: Some(thread) }
    }
}

impl Drop for Translator {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Translates a UDP datagram to the IPv4 address at the end of its IPv6 destination.
fn translate(packet: &[u8]) -> Option<Vec<u8>> {
    const UDP: u8 = 17;
    let is_udp = packet.first()? >> 4 == 6 && *packet.get(6)? == UDP;
    let destination: [u8; 4] = *packet.get(IPV6_HEADER - 4..)?.first_chunk()?;
    let payload = packet.get(IPV6_HEADER + UDP_HEADER..)?;
    is_udp.then(|| packets::udp(SOURCE, destination.into(), payload))
}

#[test]
fn nat64_on_the_node() {
    let env = TestEnv::new().with_ipv6();
    let pod = env.add_pod(PodLink::Routed);
    env.add_pod_ipv6(&pod);
    let _translator = Translator::start(&env.node);
    let [high, low] = [0xa9fe; 2];
    assert_eq!(METADATA, Ipv4Addr::new(169, 254, 169, 254));
    let well_known = Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, high, low);
    // An operator-defined prefix. Only `node_egress`, after the translator, sees the endpoint's address.
    let own = Ipv6Addr::new(0x2001, 0xdb8, 0x64, 0, 0, 0, high, low);
    env.node.ip("route add 64:ff9b::/96 dev nat64\nroute add 2001:db8:64::/96 dev nat64");
    let send = |destination: Ipv6Addr| {
        let socket = pod.netns.run(|| UdpSocket::bind("[::]:0")).unwrap();
        let _ = socket.send_to(b"translated", (destination, 9999));
    };
    env.vectors(&TC_HOOKS).one_vector("the well-known prefix", || send(well_known)).assert_blocked_all();
    env.vectors(&["node_egress"]).one_vector("a prefix of the operator's", || send(own)).assert_blocked_all();
}
