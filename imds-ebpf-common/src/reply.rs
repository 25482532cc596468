//! What a denied sender is told: packets that its own stack takes for the endpoint's answer.

use core::mem::offset_of;

use network_types::ip::{Ipv4Hdr, Ipv6Hdr};

use crate::{
    endpoint::TCP,
    packet::{self, Packet, Place},
};

/// Bytes of a word.
pub const WORD: usize = 4;
/// Words of a reset's TCP header, which has no options.
pub const TCP_WORDS: usize = 5;
/// The word of a TCP header that starts with the checksum.
pub const CHECKSUM_WORD: usize = 4;
/// Words of the ICMP and `ICMPv6` header before the quote.
pub const ICMP_WORDS: usize = 2;
/// Words before the addresses in an IPv4 header.
pub const ADDRESSES_V4: usize = offset_of!(Ipv4Hdr, src_addr) / WORD;
/// Words before the addresses in an IPv6 header.
pub const ADDRESSES_V6: usize = offset_of!(Ipv6Hdr, src_addr) / WORD;

/// IP protocol number of ICMP.
pub const ICMP: u8 = 1;
/// IP protocol number of `ICMPv6`.
pub const ICMP_V6: u8 = 58;
/// Hop limit of what is sent: Linux's own (`IPDEFTTL`).
const HOP_LIMIT: u8 = 64;

const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;

/// Words of an IPv4 packet that are quoted, by which the sender finds the socket: the header and eight bytes of what is
/// behind it (RFC 792).
pub const QUOTE_V4: usize = 5 + 2;
/// The same where the header has options, as many as there can be.
pub const QUOTE_V4_OPTIONS: usize = 15 + 2;
/// The same for IPv6.
pub const QUOTE_V6: usize = 10 + 2;

/// Bytes of a packet as words of four, as they are in memory.
pub type Words<const N: usize> = [u32; N];

/// How a packet may be answered.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// TCP right behind an IP header: by a reset.
    Reset,
    /// Anything else: by "communication administratively prohibited" of ICMP (RFC 1812 section 5.2.7.1) or `ICMPv6`
    /// (RFC 4443 section 3.1).
    Prohibited,
}

/// How a packet with an IP header at `place` is answered; `None` for what must not be: an ICMP error, a reset, any
/// fragment but the first, and a source that is no single host's (RFC 1122 section 3.2.2, RFC 4443 section 2.4).
#[inline(always)]
pub fn kind<P: Packet + ?Sized>(packet: &P, place: Place) -> Option<Kind> {
    if place.is_v6() { kind_v6(packet, place.offset()) } else { kind_v4(packet, place.offset()) }
}

#[inline(always)]
fn kind_v4<P: Packet + ?Sized>(packet: &P, offset: usize) -> Option<Kind> {
    let [version_ihl, _, _, _, _, _, fragment_0, fragment_1, _, protocol, _, _, source, ..] =
        packet.fetch::<{ Ipv4Hdr::LEN }>(offset)?;
    let fragment = u16::from_be_bytes([fragment_0, fragment_1]) & 0x1fff;
    let is_host = (1..224).contains(&source) && source != 127;
    if version_ihl >> 4 != 4 || fragment != 0 || !is_host {
        return None;
    }
    let payload = offset + usize::from(version_ihl & 0x0f) * 4;
    match protocol {
        TCP if version_ihl == 0x45 => Some(Kind::Reset),
        ICMP => {
            let [icmp_type] = packet.fetch(payload)?;
            // Unreachable, source quench, redirect, time exceeded, parameter problem.
            (!matches!(icmp_type, 3 | 4 | 5 | 11 | 12)).then_some(Kind::Prohibited)
        }
        _ => Some(Kind::Prohibited),
    }
}

#[inline(always)]
fn kind_v6<P: Packet + ?Sized>(packet: &P, offset: usize) -> Option<Kind> {
    let [next] = packet.fetch(offset + offset_of!(Ipv6Hdr, next_hdr))?;
    let [first, second] = packet.fetch(offset + offset_of!(Ipv6Hdr, src_addr))?;
    // Multicast, and with it unspecified and loopback.
    if first == 0xff || (first == 0 && second == 0) {
        return None;
    }
    match next {
        TCP => Some(Kind::Reset),
        ICMP_V6 => {
            let [icmp_type] = packet.fetch(offset + Ipv6Hdr::LEN)?;
            // Errors have the lower half of the types.
            (icmp_type >= 128).then_some(Kind::Prohibited)
        }
        packet::FRAGMENT => None,
        _ => Some(Kind::Prohibited),
    }
}

/// The sum of a pseudo-header, as it is in memory: what is in the checksum's place where a network device is to finish
/// that.
pub type Pseudo = [u8; 2];

/// Turns a segment's TCP header into that of the answer, and returns the pseudo-header's sum; `None` for a reset.
///
/// `length` is that of the segment, header and payload, in bytes, and `addresses` the sum of both addresses. Sequence
/// numbers are those of RFC 9293 section 3.10.7.1.
#[inline(always)]
pub fn reset(tcp: &mut Words<TCP_WORDS>, length: u32, addresses: Sum) -> Option<Pseudo> {
    let [ports, sequence, acknowledged, state, last] = tcp;
    let [offset, flags, _, _] = state.to_ne_bytes();
    if flags & RST != 0 {
        return None;
    }
    let payload = length.saturating_sub(u32::from(offset >> 4) * 4);
    let occupied = payload + u32::from(flags & SYN != 0) + u32::from(flags & FIN != 0);
    let flags = if flags & ACK == 0 {
        *acknowledged = u32::from_be(*sequence).wrapping_add(occupied).to_be();
        *sequence = 0;
        RST | ACK
    } else {
        *sequence = *acknowledged;
        *acknowledged = 0;
        RST
    };
    *ports = ports.rotate_left(16);
    *state = u32::from_ne_bytes([0x50, flags, 0, 0]);
    *last = 0;
    let pseudo = addresses + pseudo_tail(TCP, TCP_WORDS * WORD);
    let [c0, c1] = (pseudo + Sum::of(tcp)).checksum();
    tcp[CHECKSUM_WORD] = u32::from_ne_bytes([c0, c1, 0, 0]);
    Some(pseudo.fold().to_ne_bytes())
}

/// The ICMP header of an answer, where `quote` is the sum of what is quoted.
#[inline(always)]
#[must_use]
pub fn prohibited_v4(quote: Sum) -> Words<ICMP_WORDS> {
    icmp([3, 13], quote)
}

/// The `ICMPv6` header of an answer, where `quote` is the sum of what is quoted, `length` that of header and quote in
/// bytes, and `addresses` the sum of both addresses.
#[inline(always)]
#[must_use]
pub fn prohibited_v6(quote: Sum, length: usize, addresses: Sum) -> Words<ICMP_WORDS> {
    icmp([1, 1], quote + addresses + pseudo_tail(ICMP_V6, length))
}

#[inline(always)]
fn icmp([icmp_type, code]: [u8; 2], rest: Sum) -> Words<ICMP_WORDS> {
    let [c0, c1] = (rest + Sum::of(&[u32::from_ne_bytes([icmp_type, code, 0, 0])])).checksum();
    [u32::from_ne_bytes([icmp_type, code, c0, c1]), 0]
}

/// An IPv4 header up to the addresses, of which `addresses` is the sum, and with a payload of `length` bytes.
#[inline(always)]
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "a few headers")]
pub fn ipv4_head(protocol: u8, length: usize, addresses: Sum) -> Words<ADDRESSES_V4> {
    let [t0, t1] = ((Ipv4Hdr::LEN + length) as u16).to_be_bytes();
    let length = u32::from_ne_bytes([0x45, 0, t0, t1]);
    // No fragment and not to be one, so that it needs no identification (RFC 6864 section 4.1).
    let fragment = u32::from_ne_bytes([0, 0, 0x40, 0]);
    let last = |[c0, c1]: [u8; 2]| u32::from_ne_bytes([HOP_LIMIT, protocol, c0, c1]);
    let checksum = (addresses + Sum::of(&[length, fragment, last([0; 2])])).checksum();
    [length, fragment, last(checksum)]
}

/// An IPv6 header up to the addresses, with a payload of `length` bytes.
#[inline(always)]
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "a few headers")]
pub fn ipv6_head(next: u8, length: usize) -> Words<ADDRESSES_V6> {
    let [l0, l1] = (length as u16).to_be_bytes();
    [u32::from_ne_bytes([0x60, 0, 0, 0]), u32::from_ne_bytes([l0, l1, next, HOP_LIMIT])]
}

/// A sum of words in memory order, as the Internet checksum is one: the order does not matter (RFC 1071 section 2).
#[derive(Clone, Copy, Debug, Default)]
pub struct Sum(u64);

impl core::ops::Add for Sum {
    type Output = Self;

    #[inline(always)]
    fn add(self, Self(other): Self) -> Self {
        // Of a few hundred bytes in words of 32 bits: far from an overflow.
        Self(self.0.wrapping_add(other))
    }
}

impl Sum {
    /// A sum that was made elsewhere, in 32 bits.
    #[inline(always)]
    #[must_use]
    pub const fn new(sum: u64) -> Self {
        Self(sum)
    }

    /// The sum of these words.
    #[inline(always)]
    #[must_use]
    pub fn of<const N: usize>(words: &Words<N>) -> Self {
        words.iter().fold(Self::default(), |sum, &word| sum + Self(u64::from(word)))
    }

    /// In 16 bits, with the carries added in; never the 0 that only a sum of zeros has.
    ///
    /// To add carries in is to divide by 65,535 and keep the rest, for 65,536 leaves 1. Takes three instructions, where
    /// adding takes twenty, of which the verifier follows each in every reply.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "the rest of a division by 65,535")]
    const fn fold(self) -> u16 {
        let Self(sum) = self;
        ((sum + 0xfffe) % 0xffff + 1) as u16
    }

    /// What to put in the checksum's place.
    #[inline(always)]
    const fn checksum(self) -> [u8; 2] {
        (!self.fold()).to_ne_bytes()
    }
}

/// The part of a pseudo-header that is no address (RFC 9293 section 3.1, RFC 8200 section 8.1).
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "a few headers")]
fn pseudo_tail(protocol: u8, length: usize) -> Sum {
    Sum(u64::from((length as u32).to_be()) + u64::from(u32::from(protocol).to_be()))
}
