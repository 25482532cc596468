//! Crafted packets, as pods can send them.

use std::net::{Ipv4Addr, Ipv6Addr};

use etherparse::{IpFragOffset, IpNumber, Ipv4Header, Ipv4Options, PacketBuilder};

use crate::{Pod, services::HTTP_PORT};

const TTL: u8 = 64;
/// Closed port: an echo would make the pod send further packets.
pub(crate) const UDP_PORT: u16 = 9999;
const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];
const ETHERTYPE_IPV6: [u8; 2] = [0x86, 0xdd];

/// Builds a UDP datagram to a closed port.
#[must_use]
pub fn udp(source: Ipv4Addr, destination: Ipv4Addr, payload: &[u8]) -> Vec<u8> {
    udp_to_port(source, destination, UDP_PORT, payload)
}

/// Builds a UDP datagram to this port.
#[must_use]
pub fn udp_to_port(source: Ipv4Addr, destination: Ipv4Addr, port: u16, payload: &[u8]) -> Vec<u8> {
    let builder = PacketBuilder::ipv4(source.octets(), destination.octets(), TTL).udp(40_000, port);
    let mut packet = Vec::with_capacity(builder.size(payload.len()));
    builder.write(&mut packet, payload).expect("write to a Vec");
    packet
}

/// Builds a UDP datagram over IPv6 to a closed port.
#[must_use]
pub fn udp_v6(source: Ipv6Addr, destination: Ipv6Addr, payload: &[u8]) -> Vec<u8> {
    let builder = PacketBuilder::ipv6(source.octets(), destination.octets(), TTL).udp(40_000, UDP_PORT);
    let mut packet = Vec::with_capacity(builder.size(payload.len()));
    builder.write(&mut packet, payload).expect("write to a Vec");
    packet
}

/// Builds a TCP SYN packet to the HTTP port.
#[must_use]
pub fn syn(source: Ipv4Addr, destination: Ipv4Addr, source_port: u16, sequence: u32) -> Vec<u8> {
    let builder = PacketBuilder::ipv4(source.octets(), destination.octets(), TTL)
        .tcp(source_port, HTTP_PORT, sequence, 64_240)
        .syn();
    let mut packet = Vec::with_capacity(builder.size(0));
    builder.write(&mut packet, &[]).expect("write to a Vec");
    packet
}

/// Builds a packet of any IP protocol with a meaningless payload of 16 bytes.
#[must_use]
pub fn protocol(source: Ipv4Addr, destination: Ipv4Addr, protocol: u8) -> Vec<u8> {
    ipv4(source, destination, protocol, |_| {})
}

/// Builds a packet of any IP protocol with IPv4 options.
#[must_use]
pub fn with_options(source: Ipv4Addr, destination: Ipv4Addr, options: &[u8]) -> Vec<u8> {
    let options = Ipv4Options::try_from(options).expect("up to 40 bytes, a multiple of 4");
    ipv4(source, destination, IpNumber::UDP.0, |header| header.options = options)
}

/// Builds one fragment of a UDP datagram, at an offset of `offset` times eight bytes.
#[must_use]
pub fn fragment(source: Ipv4Addr, destination: Ipv4Addr, offset: u16, more: bool) -> Vec<u8> {
    ipv4(source, destination, IpNumber::UDP.0, |header| {
        header.fragment_offset = IpFragOffset::try_new(offset).expect("13 bits");
        header.more_fragments = more;
        header.dont_fragment = false;
        header.identification = 0x1b4d;
    })
}

/// Builds one fragment of a UDP datagram with this payload, which includes the UDP header if the fragment is the first.
#[must_use]
pub fn fragment_with(
    source: Ipv4Addr,
    destination: Ipv4Addr,
    protocol: u8,
    offset: u16,
    more: bool,
    payload: &[u8],
) -> Vec<u8> {
    let mut packet = fragment(source, destination, offset, more);
    packet.truncate(Ipv4Header::MIN_LEN);
    let (mut header, _) = Ipv4Header::from_slice(&packet).expect("a header that was just made");
    header.protocol = IpNumber(protocol);
    header.set_payload_len(payload.len()).expect("a small packet");
    let mut packet = Vec::new();
    header.write(&mut packet).expect("write to a Vec");
    packet.extend_from_slice(payload);
    packet
}

/// Builds an IPv6 packet. `next_header` is the type of the header after the fixed one.
#[must_use]
pub fn ipv6(source: Ipv6Addr, destination: Ipv6Addr, next_header: u8, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(payload.len()).expect("a small packet");
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend_from_slice(&length.to_be_bytes());
    packet.extend_from_slice(&[next_header, TTL]);
    packet.extend_from_slice(&source.octets());
    packet.extend_from_slice(&destination.octets());
    packet.extend_from_slice(payload);
    packet
}

/// Builds an Ethernet frame from `pod` to its gateway.
#[must_use]
pub fn frame(pod: &Pod, packet: &[u8]) -> Vec<u8> {
    tagged_frame(pod, pod.gateway_mac, &[], packet)
}

/// Builds an Ethernet frame from `pod` with VLAN tags, outermost first, each as type and content.
#[must_use]
pub fn tagged_frame(pod: &Pod, destination: [u8; 6], tags: &[(u16, u16)], packet: &[u8]) -> Vec<u8> {
    let mut frame = [destination, pod.mac].concat();
    for (ether_type, tag) in tags {
        frame.extend_from_slice(&ether_type.to_be_bytes());
        frame.extend_from_slice(&tag.to_be_bytes());
    }
    let is_v6 = packet.first().is_some_and(|version| version >> 4 == 6);
    frame.extend_from_slice(if is_v6 { &ETHERTYPE_IPV6 } else { &ETHERTYPE_IPV4 });
    frame.extend_from_slice(packet);
    frame
}

fn ipv4(
    source: Ipv4Addr,
    destination: Ipv4Addr,
    protocol: u8,
    adapt: impl FnOnce(&mut Ipv4Header),
) -> Vec<u8> {
    let payload = [0, 7].repeat(8);
    let mut header = Ipv4Header::new(0, TTL, IpNumber(protocol), source.octets(), destination.octets())
        .expect("no payload is not too much");
    adapt(&mut header);
    header.set_payload_len(payload.len()).expect("a small packet");
    let mut packet = Vec::new();
    header.write(&mut packet).expect("write to a Vec");
    packet.extend_from_slice(&payload);
    packet
}
