//! Packet parser: finds the destination address of a frame and, for endpoints with allowed ports, the destination port.

use core::mem::offset_of;

use network_types::{
    eth::EthHdr,
    ip::{Ipv4Hdr, Ipv6Hdr},
};

use crate::{
    address::{Address, Destination, may_embed_ipv4},
    endpoint::{Service, TCP, UDP},
    flow::Flow,
    link_layer::{ETH_P_IP, ETH_P_IPV6, IpOffset, LinkLayer, ether_type_of_ip, is_vlan},
    policy_lookup::PolicyLookup,
};

/// Flow hash (`skb->hash`) of packets to protected endpoints that a hook has let pass, by which the next hook recognizes them. An
/// arbitrary number: hashes that the kernel chooses are random, so that a packet has this one with a probability of 2⁻³².
pub const PASSED_HASH: u32 = 0xa5c3_169e;

/// Largest number of VLAN tags that the parser skips. Linux allows at most 8 stacked devices (`MAX_NEST_DEV`,
/// include/linux/netdevice.h).
///
/// Frames with more tags are denied whatever their destination is: Linux removes any number of priority tags (VLAN 0,
/// `__netif_receive_skb_core`).
pub const MAX_VLAN_TAGS: usize = 8;

/// Largest number of IPv6 extension headers that the parser skips to find ports. Senders should include each kind at most
/// once, and destination options at most twice (RFC 8200 section 4.1).
pub const MAX_EXTENSION_HEADERS: usize = 4;

const ETHER_TYPE_OFFSET: usize = EthHdr::LEN - size_of::<u16>();
const VLAN_TAG_LEN: usize = 4;
const DESTINATION_OFFSET: usize = offset_of!(Ipv4Hdr, dst_addr);
const DESTINATION_OFFSET_V6: usize = offset_of!(Ipv6Hdr, dst_addr);

const HOP_BY_HOP_OPTIONS: u8 = 0;
pub(crate) const FRAGMENT: u8 = 44;
const DESTINATION_OPTIONS: u8 = 60;
/// Offset of the destination port in TCP and UDP headers, in bytes.
const DESTINATION_PORT_OFFSET: usize = 2;

/// Read access to the bytes of a packet. Offset 0 is the first byte that the hook sees.
///
/// Implemented by the socket buffer in the BPF programs and by byte slices on the host.
pub trait Packet {
    /// Reads `N` bytes at `offset` from the start of the packet, or returns `None` if the packet is shorter.
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]>;

    /// Returns the EtherType of the first header after the link-layer header, in memory order: 0 if the packet has no
    /// link-layer header and is not IP. Returns `None` if the packet is shorter.
    #[inline(always)]
    fn ether_type(&self, link_layer: LinkLayer) -> Option<u16> {
        Some(match link_layer {
            LinkLayer::Ethernet => u16::from_ne_bytes(self.fetch(ETHER_TYPE_OFFSET)?),
            LinkLayer::None => ether_type_of_ip(u16::from_ne_bytes(self.fetch(0)?)),
        })
    }

    /// Returns [`Packet::ether_type`] and the 32-bit word at `offset`, in memory order. May fail for packets of any length.
    #[inline(always)]
    fn peek_ether_type(&self, link_layer: LinkLayer, offset: usize) -> Option<(u16, u32)> {
        match link_layer {
            LinkLayer::Ethernet => self.peek_words(ETHER_TYPE_OFFSET, offset),
            LinkLayer::None => {
                self.peek_words(0, offset).map(|(first, word)| (ether_type_of_ip(first), word))
            }
        }
    }

    /// Variant of [`Packet::read_words`] that may fail for packets of any length, such as non-linear ones. `None` implies
    /// nothing about the length.
    #[inline(always)]
    fn peek_words(&self, first: usize, second: usize) -> Option<(u16, u32)> {
        self.read_words(first, second)
    }

    /// Variant of [`Packet::read_pair`] that may fail for packets of any length, such as non-linear ones. `None` implies
    /// nothing about the length.
    #[inline(always)]
    fn peek_pair(&self, offset: usize) -> Option<(u64, u64)> {
        self.read_pair(offset)
    }

    /// Reads a 16-bit word at `first` and a 32-bit word at `second`, both in memory order. `second` must be greater.
    ///
    /// One call reads both, so that an implementation checks the length of the packet only once.
    #[inline(always)]
    fn read_words(&self, first: usize, second: usize) -> Option<(u16, u32)> {
        Some((u16::from_ne_bytes(self.read(first)?), u32::from_ne_bytes(self.read(second)?)))
    }

    /// Reads two consecutive 64-bit words in memory order.
    #[inline(always)]
    fn read_pair(&self, offset: usize) -> Option<(u64, u64)> {
        Some((u64::from_ne_bytes(self.read(offset)?), u64::from_ne_bytes(self.read(offset + 8)?)))
    }

    /// Returns `offset` unchanged and hides its bounds from the verifier, which then checks the code after it once, not
    /// once for each position of the header.
    #[inline(always)]
    fn verifier_opaque(&self, offset: usize) -> usize {
        offset
    }

    /// Returns the [`service`] of a packet with an IP header at `ip`. The BPF programs do this in a separate function.
    #[inline(always)]
    fn service(&self, ip: IpOffset) -> Option<Service> {
        service(self, ip)
    }

    /// Variant of [`Packet::read`] for offsets that the compiler does not know. The BPF programs call a helper for it.
    #[inline(always)]
    fn fetch<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.read(offset)
    }
}

impl Packet for [u8] {
    #[inline]
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.get(offset..)?.first_chunk().copied()
    }
}

/// Fast path: reports whether the bytes at the usual offset of the destination exclude a protected endpoint. If so, the packet
/// certainly is not for one.
///
/// `false` decides nothing. Nearly every packet runs only this code, so it makes no call and needs few registers: a program
/// that uses one of R6 to R9 saves it on the stack for each packet.
#[inline(always)]
pub fn is_unrelated_fast<P, T>(packet: &P, link_layer: LinkLayer, policy: &T) -> bool
where
    P: Packet + ?Sized,
    T: PolicyLookup + ?Sized,
{
    let ip = link_layer.header_len();
    let Some((ether_type, v4)) = packet.peek_ether_type(link_layer, ip + DESTINATION_OFFSET) else {
        return false;
    };
    if ether_type == ETH_P_IP {
        return !policy.may_be_protected(Destination::V4(v4).slot());
    }
    ether_type == ETH_P_IPV6
        && packet.peek_pair(ip + DESTINATION_OFFSET_V6).is_some_and(|(first, second)| {
            !may_embed_ipv4(first) && !policy.may_be_protected(Destination::V6(first, second).slot())
        })
}

/// Reports whether an Ethernet frame without an IP header, or with an IPv4 header behind one VLAN tag, excludes a protected
/// endpoint. Most tagged frames have one tag in the data, because the kernel moves the outer one to the skb metadata.
///
/// `false` decides nothing.
#[inline(always)]
pub fn is_unrelated_frame<P, T>(packet: &P, policy: &T) -> bool
where
    P: Packet + ?Sized,
    T: PolicyLookup + ?Sized,
{
    let tagged = EthHdr::LEN + VLAN_TAG_LEN;
    match packet.peek_ether_type(LinkLayer::Ethernet, tagged + DESTINATION_OFFSET) {
        Some((ETH_P_IP | ETH_P_IPV6, _)) | None => false,
        Some((ether_type, _)) if !is_vlan(ether_type) => true,
        Some((_, v4)) => {
            match packet.peek_words(ETHER_TYPE_OFFSET + VLAN_TAG_LEN, tagged + DESTINATION_OFFSET) {
                Some((ETH_P_IP, _)) => !policy.may_be_protected(Destination::V4(v4).slot()),
                Some(_) | None => false,
            }
        }
    }
}

/// Reason why [`find_header`] finds no IP header.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum NoHeader {
    /// The packet has another protocol, or is cut off before the header.
    NotIp,
    /// The frame has more than [`MAX_VLAN_TAGS`] VLAN tags.
    TooManyTags,
}

/// Finds the IP header of a packet, behind up to [`MAX_VLAN_TAGS`] VLAN tags.
///
/// Ignores the other fields of the header. The destination has a fixed offset, so a packet with an EtherType of IP gets a
/// verdict even if its header is malformed.
#[inline(always)]
pub fn find_header<P: Packet + ?Sized>(packet: &P, link_layer: LinkLayer) -> Result<IpOffset, NoHeader> {
    let mut offset = link_layer.header_len();
    let mut ether_type = packet.ether_type(link_layer).ok_or(NoHeader::NotIp)?;
    for _ in 0..MAX_VLAN_TAGS {
        if !is_vlan(ether_type) {
            break;
        }
        offset += VLAN_TAG_LEN;
        let bytes = packet.fetch(offset - size_of::<u16>()).ok_or(NoHeader::NotIp)?;
        ether_type = u16::from_ne_bytes(bytes);
    }
    // Hidden from the verifier, which otherwise follows the rest for each number of tags.
    let offset = packet.verifier_opaque(offset);
    match ether_type {
        ETH_P_IP => Ok(IpOffset::v4(offset)),
        ETH_P_IPV6 => Ok(IpOffset::v6(offset)),
        _ if is_vlan(ether_type) => Err(NoHeader::TooManyTags),
        _ => Err(NoHeader::NotIp),
    }
}

/// Reads the destination of a packet with an IP header at `ip`. Returns `None` if the packet is cut off before its end.
#[inline(always)]
pub(crate) fn destination<P: Packet + ?Sized>(packet: &P, ip: IpOffset) -> Option<Destination> {
    if !ip.is_v6() {
        let word = packet.fetch(ip.offset() + DESTINATION_OFFSET)?;
        return Some(Destination::V4(u32::from_ne_bytes(word)));
    }
    let at = ip.offset() + DESTINATION_OFFSET_V6;
    let (first, second) = (packet.fetch(at)?, packet.fetch(at + size_of::<u64>())?);
    Some(Destination::from_halves(u64::from_ne_bytes(first), u64::from_ne_bytes(second)))
}

/// Returns the flow of a packet with an IP header at `ip`, or `None` if the packet is cut off before the end of the header.
///
/// Does not skip IPv6 extension headers: a packet with extension headers has a flow without ports.
#[inline(always)]
pub fn flow<P: Packet + ?Sized>(packet: &P, ip: IpOffset) -> Option<Flow> {
    let offset = ip.offset();
    let mut flow = Flow::to([0; 16]);
    let payload = if ip.is_v6() {
        let [next] = packet.fetch(offset + offset_of!(Ipv6Hdr, next_hdr))?;
        flow.source = packet.fetch(offset + offset_of!(Ipv6Hdr, src_addr))?;
        flow.destination = packet.fetch(offset + DESTINATION_OFFSET_V6)?;
        flow.protocol = next;
        has_ports(next).then_some(offset + Ipv6Hdr::LEN)
    } else {
        let ip = packet.fetch::<20>(offset)?;
        let [version_ihl, _, _, _, _, _, fragment_0, fragment_1, _, protocol, _, _, addresses @ ..] = ip;
        let [s0, s1, s2, s3, d0, d1, d2, d3] = addresses;
        flow.source = Address::from_ipv4([s0, s1, s2, s3]).octets();
        flow.destination = Address::from_ipv4([d0, d1, d2, d3]).octets();
        flow.protocol = protocol;
        let fragment = u16::from_be_bytes([fragment_0, fragment_1]) & 0x1fff;
        (has_ports(protocol) && fragment == 0).then_some(offset + usize::from(version_ihl & 0x0f) * 4)
    };
    // Hidden from the verifier, which otherwise follows the rest again for packets with ports.
    #[expect(clippy::cast_possible_truncation, reason = "the value is zero")]
    let none = (packet.verifier_opaque(0) as u32).to_ne_bytes();
    let [source_0, source_1, destination_0, destination_1] =
        payload.and_then(|offset| packet.fetch(offset)).unwrap_or(none);
    flow.source_port = u16::from_be_bytes([source_0, source_1]);
    flow.destination_port = u16::from_be_bytes([destination_0, destination_1]);
    Some(flow)
}

/// Returns the source address of a packet with an IP header at `ip`; `None` if it is cut off. Does not extract an embedded IPv4
/// address, which no translator or tunnel uses as the source inside the node.
#[inline(always)]
pub fn source<P: Packet + ?Sized>(packet: &P, ip: IpOffset) -> Option<Address> {
    let offset = ip.offset();
    if ip.is_v6() {
        return packet.fetch(offset + offset_of!(Ipv6Hdr, src_addr)).map(Address::from_octets);
    }
    packet.fetch(offset + offset_of!(Ipv4Hdr, src_addr)).map(Address::from_ipv4)
}

/// Returns protocol and destination port of a packet with an IP header at `ip`.
///
/// Returns `None` for protocols other than TCP and UDP, for fragments other than the first, for extension headers that the
/// parser does not skip, and for malformed and truncated packets.
#[inline(always)]
pub fn service<P: Packet + ?Sized>(packet: &P, ip: IpOffset) -> Option<Service> {
    if let Some(service) = plain_service(packet, ip) {
        return Some(service);
    }
    let (protocol, offset) =
        if ip.is_v6() { payload_v6(packet, ip.offset())? } else { payload_v4(packet, ip.offset())? };
    let port = u16::from_be_bytes(packet.fetch(offset + DESTINATION_PORT_OFFSET)?);
    Some(Service::new(protocol, port))
}

/// Fast path of [`service`] for packets without VLAN tags, IP options and extension headers. `None` decides nothing.
#[inline(always)]
fn plain_service<P: Packet + ?Sized>(packet: &P, ip: IpOffset) -> Option<Service> {
    if ip.offset() != EthHdr::LEN {
        return None;
    }
    let (protocol, ports) = if ip.is_v6() {
        let (next, ports) = packet.peek_words(EthHdr::LEN + 6, EthHdr::LEN + Ipv6Hdr::LEN)?;
        let [next, _] = next.to_ne_bytes();
        (next, ports)
    } else {
        let (start, _) = packet.peek_pair(EthHdr::LEN)?;
        let [version_ihl, _, _, _, _, _, fragment_0, fragment_1] = start.to_ne_bytes();
        let fragment = u16::from_be_bytes([fragment_0, fragment_1]) & 0x1fff;
        if version_ihl != 0x45 || fragment != 0 {
            return None;
        }
        let (protocol, ports) = packet.peek_words(EthHdr::LEN + 8, EthHdr::LEN + Ipv4Hdr::LEN)?;
        let [_, protocol] = protocol.to_ne_bytes();
        (protocol, ports)
    };
    let [_, _, port_0, port_1] = ports.to_ne_bytes();
    has_ports(protocol).then(|| Service::new(protocol, u16::from_be_bytes([port_0, port_1])))
}

/// Returns the protocol and the offset of the TCP or UDP header of a packet with an IP header at `ip`. Does not skip IPv6
/// extension headers.
///
/// Returns `None` for other protocols, for fragments other than the first, and for malformed and truncated packets.
#[inline(always)]
pub(crate) fn plain_transport<P: Packet + ?Sized>(packet: &P, ip: IpOffset) -> Option<(u8, usize)> {
    if !ip.is_v6() {
        return payload_v4(packet, ip.offset());
    }
    let [next] = packet.fetch(ip.offset() + offset_of!(Ipv6Hdr, next_hdr))?;
    has_ports(next).then_some((next, ip.offset() + Ipv6Hdr::LEN))
}

/// Returns the protocol and the offset of the payload of an IPv4 header.
#[inline(always)]
fn payload_v4<P: Packet + ?Sized>(packet: &P, header: usize) -> Option<(u8, usize)> {
    let [version_ihl, _, _, _, _, _, fragment_0, fragment_1, _, protocol] = packet.fetch(header)?;
    let (version, words) = (version_ihl >> 4, usize::from(version_ihl & 0x0f));
    let fragment = u16::from_be_bytes([fragment_0, fragment_1]) & 0x1fff;
    let is_known = version == 4 && words >= 5 && fragment == 0 && has_ports(protocol);
    is_known.then_some((protocol, header + words * 4))
}

/// Returns the protocol and the offset of the payload of an IPv6 header. Skips extension headers that do not change the
/// destination.
#[inline(always)]
fn payload_v6<P: Packet + ?Sized>(packet: &P, header: usize) -> Option<(u8, usize)> {
    let [mut next] = packet.fetch(header + offset_of!(Ipv6Hdr, next_hdr))?;
    let mut offset = header + Ipv6Hdr::LEN;
    for _ in 0..MAX_EXTENSION_HEADERS {
        if !matches!(next, HOP_BY_HOP_OPTIONS | DESTINATION_OPTIONS | FRAGMENT) {
            break;
        }
        let [after, length, fragment_0, fragment_1] = packet.fetch(offset)?;
        if next == FRAGMENT {
            if u16::from_be_bytes([fragment_0, fragment_1]) >> 3 != 0 {
                return None;
            }
            offset += 8;
        } else {
            offset += (usize::from(length) + 1) * 8;
        }
        next = after;
    }
    has_ports(next).then_some((next, offset))
}

#[inline(always)]
const fn has_ports(protocol: u8) -> bool {
    matches!(protocol, TCP | UDP)
}
