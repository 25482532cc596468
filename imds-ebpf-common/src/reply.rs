//! Replies to denied senders: headers of packets that the sender's stack accepts as replies of the endpoint.

use core::mem::offset_of;

use network_types::ip::{Ipv4Hdr, Ipv6Hdr};

use crate::{
    endpoint::TCP,
    link_layer::IpOffset,
    packet::{self, Packet},
};

/// Size of a word in bytes. Functions of this module take parts of a packet as 32-bit words in memory order.
pub const WORD: usize = 4;
/// Size of the TCP header of a reset in words. The header has no options.
pub const TCP_WORDS: usize = 5;
/// Index of the word of a TCP header that starts with the checksum.
pub const CHECKSUM_WORD: usize = 4;
/// Size of the ICMP and `ICMPv6` header in words.
pub const ICMP_WORDS: usize = 2;
/// Offset of the addresses in an IPv4 header, in words.
pub const ADDRESSES_V4: usize = offset_of!(Ipv4Hdr, src_addr) / WORD;
/// Offset of the addresses in an IPv6 header, in words.
pub const ADDRESSES_V6: usize = offset_of!(Ipv6Hdr, src_addr) / WORD;

/// IP protocol number of ICMP.
pub const ICMP: u8 = 1;
/// IP protocol number of `ICMPv6`.
pub const ICMP_V6: u8 = 58;
/// Hop limit of replies: the default of Linux (`IPDEFTTL`).
const HOP_LIMIT: u8 = 64;

const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;

/// Number of words of the denied IPv4 packet that an ICMP error quotes: the header and eight bytes of payload (RFC 792), by
/// which the sender finds the socket.
pub const QUOTE_V4: usize = 5 + 2;
/// Number of quoted words of an IPv4 packet with options: the largest header and eight bytes of payload.
pub const QUOTE_V4_OPTIONS: usize = 15 + 2;
/// Number of quoted words of an IPv6 packet: the header and eight bytes of payload.
pub const QUOTE_V6: usize = 10 + 2;

/// Kind of the reply to a denied packet.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ReplyKind {
    /// TCP reset, if the TCP header directly follows an IP header without options.
    Reset,
    /// "Communication administratively prohibited" of ICMP (RFC 1812 section 5.2.7.1) or `ICMPv6` (RFC 4443 section 3.1), for
    /// all other packets.
    Prohibited,
}

/// Returns the kind of the reply to a packet with an IP header at `ip`.
///
/// Returns `None` for packets that must not be answered (RFC 1122 section 3.2.2, RFC 4443 section 2.4): ICMP errors,
/// fragments other than the first, and packets whose source is not a single host. [`reset`] also excludes resets.
#[inline(always)]
pub fn reply_kind<P: Packet + ?Sized>(packet: &P, ip: IpOffset) -> Option<ReplyKind> {
    if ip.is_v6() { reply_kind_v6(packet, ip.offset()) } else { reply_kind_v4(packet, ip.offset()) }
}

#[inline(always)]
fn reply_kind_v4<P: Packet + ?Sized>(packet: &P, offset: usize) -> Option<ReplyKind> {
    let [version_ihl, _, _, _, _, _, fragment_0, fragment_1, _, protocol, _, _, source, ..] =
        packet.fetch::<{ Ipv4Hdr::LEN }>(offset)?;
    let fragment = u16::from_be_bytes([fragment_0, fragment_1]) & 0x1fff;
    let is_host = (1..224).contains(&source) && source != 127;
    if version_ihl >> 4 != 4 || fragment != 0 || !is_host {
        return None;
    }
    let payload = offset + usize::from(version_ihl & 0x0f) * 4;
    match protocol {
        TCP if version_ihl == 0x45 => Some(ReplyKind::Reset),
        ICMP => {
            let [icmp_type] = packet.fetch(payload)?;
            // The ICMP errors: unreachable, source quench, redirect, time exceeded, parameter problem.
            (!matches!(icmp_type, 3 | 4 | 5 | 11 | 12)).then_some(ReplyKind::Prohibited)
        }
        _ => Some(ReplyKind::Prohibited),
    }
}

#[inline(always)]
fn reply_kind_v6<P: Packet + ?Sized>(packet: &P, offset: usize) -> Option<ReplyKind> {
    let [next] = packet.fetch(offset + offset_of!(Ipv6Hdr, next_hdr))?;
    let [first, second] = packet.fetch(offset + offset_of!(Ipv6Hdr, src_addr))?;
    // Multicast; and `::/16`, which contains the unspecified and the loopback address.
    if first == 0xff || (first == 0 && second == 0) {
        return None;
    }
    match next {
        TCP => Some(ReplyKind::Reset),
        ICMP_V6 => {
            let [icmp_type] = packet.fetch(offset + Ipv6Hdr::LEN)?;
            // Types below 128 are errors.
            (icmp_type >= 128).then_some(ReplyKind::Prohibited)
        }
        packet::FRAGMENT => None,
        _ => Some(ReplyKind::Prohibited),
    }
}

/// Folded sum of a pseudo-header in memory order: the value of the checksum field if the network device completes the
/// checksum (`CHECKSUM_PARTIAL`).
pub type PseudoHeaderSum = [u8; 2];

/// Turns the TCP header of a segment into the header of the reset that answers it, and returns the sum of the
/// pseudo-header. Returns `None` if the segment is a reset itself.
///
/// `length` is the length of header and payload of the segment in bytes; `addresses` is the sum of both addresses. The
/// sequence numbers follow RFC 9293 section 3.10.7.1.
#[inline(always)]
pub fn reset(tcp: &mut [u32; TCP_WORDS], length: u32, addresses: Sum) -> Option<PseudoHeaderSum> {
    let [ports, sequence, acknowledged, state, last] = tcp;
    let [offset, flags, _, _] = state.to_ne_bytes();
    if flags & RST != 0 {
        return None;
    }
    let payload = length.saturating_sub(u32::from(offset >> 4) * 4);
    let occupied = payload + u32::from(flags & SYN != 0) + u32::from(flags & FIN != 0);
    // All bits if the segment acknowledges nothing, else none. A mask, because the verifier follows both ways of a branch.
    let no_ack = (u32::from(flags & ACK) / u32::from(ACK)).wrapping_sub(1);
    let next = u32::from_be(*sequence).wrapping_add(occupied).to_be();
    *sequence = *acknowledged & !no_ack;
    *acknowledged = next & no_ack;
    let [ack, ..] = (no_ack & u32::from(ACK)).to_le_bytes();
    let flags = RST | ack;
    *ports = ports.rotate_left(16);
    *state = u32::from_ne_bytes([0x50, flags, 0, 0]);
    *last = 0;
    let pseudo = addresses + pseudo_header_sum(TCP, TCP_WORDS * WORD);
    let [c0, c1] = (pseudo + Sum::from_words(tcp)).checksum();
    tcp[CHECKSUM_WORD] = u32::from_ne_bytes([c0, c1, 0, 0]);
    Some(pseudo.fold().to_ne_bytes())
}

/// Returns the ICMP header of a reply. `quote` is the sum of the quoted words.
#[inline(always)]
#[must_use]
pub fn prohibited_v4(quote: Sum) -> [u32; ICMP_WORDS] {
    icmp([3, 13], quote)
}

/// Returns the `ICMPv6` header of a reply. `quote` is the sum of the quoted words, `length` the length of header and quote
/// in bytes, and `addresses` the sum of both addresses.
#[inline(always)]
#[must_use]
pub fn prohibited_v6(quote: Sum, length: usize, addresses: Sum) -> [u32; ICMP_WORDS] {
    icmp([1, 1], quote + addresses + pseudo_header_sum(ICMP_V6, length))
}

#[inline(always)]
fn icmp([icmp_type, code]: [u8; 2], rest: Sum) -> [u32; ICMP_WORDS] {
    let [c0, c1] = (rest + Sum::from_words(&[u32::from_ne_bytes([icmp_type, code, 0, 0])])).checksum();
    [u32::from_ne_bytes([icmp_type, code, c0, c1]), 0]
}

/// Returns an IPv4 header up to the addresses. `addresses` is the sum of both addresses, `length` the length of the payload
/// in bytes.
#[inline(always)]
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "the length of a few headers")]
pub fn ipv4_header_start(protocol: u8, length: usize, addresses: Sum) -> [u32; ADDRESSES_V4] {
    let [t0, t1] = ((Ipv4Hdr::LEN + length) as u16).to_be_bytes();
    let length = u32::from_ne_bytes([0x45, 0, t0, t1]);
    // "Don't fragment" is set, so that the identification may be 0 (RFC 6864 section 4.1).
    let fragment = u32::from_ne_bytes([0, 0, 0x40, 0]);
    let last = |[c0, c1]: [u8; 2]| u32::from_ne_bytes([HOP_LIMIT, protocol, c0, c1]);
    let checksum = (addresses + Sum::from_words(&[length, fragment, last([0; 2])])).checksum();
    [length, fragment, last(checksum)]
}

/// Returns an IPv6 header up to the addresses. `length` is the length of the payload in bytes.
#[inline(always)]
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "the length of a few headers")]
pub fn ipv6_header_start(next: u8, length: usize) -> [u32; ADDRESSES_V6] {
    let [l0, l1] = (length as u16).to_be_bytes();
    [u32::from_ne_bytes([0x60, 0, 0, 0]), u32::from_ne_bytes([l0, l1, next, HOP_LIMIT])]
}

/// Unfolded Internet checksum of words in memory order. The byte order does not matter (RFC 1071 section 2).
#[derive(Clone, Copy, Debug, Default)]
pub struct Sum(u64);

impl core::ops::Add for Sum {
    type Output = Self;

    #[inline(always)]
    fn add(self, Self(other): Self) -> Self {
        // Does not overflow: the sums cover a few hundred bytes in 32-bit words.
        Self(self.0.wrapping_add(other))
    }
}

impl Sum {
    /// Creates a sum from the 32-bit result of a helper.
    #[inline(always)]
    #[must_use]
    pub const fn new(sum: u64) -> Self {
        Self(sum)
    }

    /// Returns the sum of these words.
    #[inline(always)]
    #[must_use]
    pub fn from_words<const N: usize>(words: &[u32; N]) -> Self {
        words.iter().fold(Self::default(), |sum, &word| sum + Self(u64::from(word)))
    }

    /// Folds the carries into 16 bits. Never returns 0, which only a sum of zeros would have.
    ///
    /// Folding equals `sum % 65535`, because 65536 ≡ 1 (mod 65535). This takes 3 instructions instead of 20, which keeps
    /// verifier work low.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "the remainder is less than 65,535")]
    const fn fold(self) -> u16 {
        let Self(sum) = self;
        ((sum + 0xfffe) % 0xffff + 1) as u16
    }

    /// Returns the value of the checksum field.
    #[inline(always)]
    const fn checksum(self) -> [u8; 2] {
        (!self.fold()).to_ne_bytes()
    }
}

/// Returns the sum of a pseudo-header without the addresses (RFC 9293 section 3.1, RFC 8200 section 8.1).
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "the length of a few headers")]
fn pseudo_header_sum(protocol: u8, length: usize) -> Sum {
    Sum(u64::from((length as u32).to_be()) + u64::from(u32::from(protocol).to_be()))
}
