//! Destination addresses in the one form in which they are looked up.

use crate::packet::Packet;

/// Slots of the [`Filter`](crate::Filter): as many as 16 bits can number.
pub const SLOTS: usize = 1 << 16;

/// First 64 bits of `64:ff9b::/96` (RFC 6052, the well-known NAT64 prefix).
const NAT64: u64 = u64::from_be_bytes([0, 0x64, 0xff, 0x9b, 0, 0, 0, 0]).to_be();
/// First 16 bits of `2002::/16` (6to4, RFC 3056): the next 32 bits are an IPv4 address.
const SIX_TO_FOUR: u16 = 0x2002_u16.to_be();
/// Bits 64 to 95 of `::ffff:0:0/96` (IPv4-mapped, RFC 4291 section 2.5.5.2).
const MAPPED: u32 = 0xffff_u32.to_be();

/// An IPv6 address, or an IPv4 address in the IPv4-mapped form: the key of the endpoints' map.
///
/// Octets are in network byte order. An IPv6 address that embeds an IPv4 address and is turned into it on the way
/// (IPv4-mapped, IPv4-compatible, NAT64, 6to4) counts as that IPv4 address.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Address {
    octets: [u8; 16],
}

impl Address {
    /// No endpoint's: IPv4's 0.0.0.0 is another.
    pub const NONE: Self = Self { octets: [0; 16] };
    /// In the place of every endpoint's: 0.0.0.0, which none can have.
    pub const ANY: Self = Self::from_ipv4([0; 4]);

    /// The octets as two words, as they are in memory.
    #[inline(always)]
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "the lower half")]
    pub fn halves(self) -> [u64; 2] {
        let both = u128::from_ne_bytes(self.octets);
        [both as u64, (both >> 64) as u64]
    }

    /// An IPv4 address, in network byte order.
    #[inline(always)]
    #[must_use]
    pub const fn from_ipv4(octets: [u8; 4]) -> Self {
        // As one number: of an array's zeros the compiler makes a call that the verifier refuses.
        Self { octets: (0xffff_0000_0000 | u32::from_be_bytes(octets) as u128).to_be_bytes() }
    }

    /// An IPv6 address, in network byte order, or the IPv4 address that it embeds.
    #[inline(always)]
    #[must_use]
    pub fn from_ipv6(octets: [u8; 16]) -> Self {
        match Destination::from_ipv6(octets) {
            Destination::V4(word) => Self::from_ipv4(word.to_ne_bytes()),
            Destination::V6(..) => Self { octets },
        }
    }

    /// The octets, in network byte order.
    #[must_use]
    pub const fn octets(self) -> [u8; 16] {
        self.octets
    }

    /// The IPv4 address that this is, in network byte order, if it is one.
    #[must_use]
    pub fn ipv4(self) -> Option<[u8; 4]> {
        match Destination::from_ipv6(self.octets) {
            Destination::V4(word) => Some(word.to_ne_bytes()),
            Destination::V6(..) => None,
        }
    }

    /// Hides from a verifier how the address was found, like [`Packet::forget_origin`].
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "BPF has words of 64 bits")]
    pub(crate) fn without_origin<P: Packet + ?Sized>(self, packet: &P) -> Self {
        let [low, high] = self.halves().map(|half| packet.forget_origin(half as usize) as u64);
        Self { octets: (u128::from(low) | u128::from(high) << 64).to_ne_bytes() }
    }

    /// The filter's slot for this address.
    #[must_use]
    pub fn slot(self) -> u16 {
        Destination::from_ipv6(self.octets).slot()
    }
}

/// An address as the registers of a fast path have it: words as they are in memory.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Destination {
    /// IPv4, or IPv6 that embeds it.
    V4(u32),
    /// Any other IPv6: the first and the second eight octets.
    V6(u64, u64),
}

impl Destination {
    #[inline(always)]
    #[expect(clippy::indexing_slicing, reason = "eight of sixteen, from the first or the ninth on")]
    pub(crate) fn from_ipv6(octets: [u8; 16]) -> Self {
        let half = |start: usize| u64::from_ne_bytes(core::array::from_fn(|index| octets[start + index]));
        Self::from_halves(half(0), half(8))
    }

    /// From the first and the second eight octets of an IPv6 address.
    #[inline(always)]
    pub(crate) fn from_halves(first: u64, second: u64) -> Self {
        if first_16(first) == SIX_TO_FOUR {
            let [_, _, v4 @ .., _, _] = first.to_ne_bytes();
            return Self::V4(u32::from_ne_bytes(v4));
        }
        if first != 0 && first != NAT64 {
            return Self::V6(first, second);
        }
        let [third @ .., _, _, _, _] = second.to_ne_bytes();
        let [_, _, _, _, v4 @ ..] = second.to_ne_bytes();
        // Where both are zero it is the IPv4-compatible form (RFC 4291 section 2.5.5.1), which sit tunnels unpack. `::`
        // and `::1` are 0.0.0.0 and 0.0.0.1 then, which no endpoint is.
        match u32::from_ne_bytes(third) {
            0 => Self::V4(u32::from_ne_bytes(v4)),
            MAPPED if first == 0 => Self::V4(u32::from_ne_bytes(v4)),
            _ => Self::V6(first, second),
        }
    }

    /// A fold that is cheap and keeps neighbours apart.
    #[inline(always)]
    pub(crate) fn slot(self) -> u16 {
        match self {
            Self::V4(word) => low_16(u64::from(word ^ (word >> 16))),
            Self::V6(first, second) => {
                let word = first ^ second;
                let word = word ^ (word >> 32);
                low_16(word ^ (word >> 16))
            }
        }
    }

    #[inline(always)]
    pub(crate) fn address(self) -> Address {
        // Two registers are stored as they are; octet by octet the compiler would call memset, which BPF has not.
        let (first, second) = match self {
            Self::V4(word) => (0, u64::from(MAPPED.to_le()) | u64::from(word.to_le()) << 32),
            Self::V6(first, second) => (first.to_le(), second.to_le()),
        };
        Address { octets: (u128::from(first) | u128::from(second) << 64).to_le_bytes() }
    }
}

/// Reports whether an IPv6 address with these first eight octets may embed an IPv4 address.
///
/// One test covers the first 16 bits of all the forms. A few other addresses pass it too, but none in `2001::/16`, `2400::/6` or
/// `fc00::/7`.
#[inline(always)]
pub(crate) const fn may_embed_ipv4(first: u64) -> bool {
    const PREFIXES: u16 = first_16(NAT64) | SIX_TO_FOUR;
    first_16(first) & !PREFIXES == 0
}

/// The first two of eight octets, as they are in memory.
#[inline(always)]
const fn first_16(octets: u64) -> u16 {
    let [first, second, ..] = octets.to_ne_bytes();
    u16::from_ne_bytes([first, second])
}

#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "the fold is in the low bits")]
const fn low_16(word: u64) -> u16 {
    word as u16
}

const _: () = assert!(size_of::<Address>() == 16);
