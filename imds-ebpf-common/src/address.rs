//! Destination addresses in the canonical form that the policy lookup uses.

use crate::packet::Packet;

/// Number of bits in the address bitmap of the [`PolicyFilter`](crate::PolicyFilter): one for each value of a 16-bit hash.
pub const SLOTS: usize = 1 << 16;

/// First 64 bits of `64:ff9b::/96` (RFC 6052, the well-known NAT64 prefix).
const NAT64: u64 = u64::from_be_bytes([0, 0x64, 0xff, 0x9b, 0, 0, 0, 0]).to_be();
/// First 16 bits of `2002::/16` (6to4, RFC 3056): the next 32 bits are an IPv4 address.
const SIX_TO_FOUR: u16 = 0x2002_u16.to_be();
/// Bits 64 to 95 of `::ffff:0:0/96` (IPv4-mapped, RFC 4291 section 2.5.5.2).
const MAPPED: u32 = 0xffff_u32.to_be();

/// An IPv6 address, or an IPv4 address in the IPv4-mapped form. Key of the map of endpoints.
///
/// Octets are in network byte order. IPv6 forms that a translator or tunnel turns into an IPv4 address (IPv4-mapped,
/// IPv4-compatible, NAT64, 6to4) are stored as that IPv4 address.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Address {
    octets: [u8; 16],
}

impl Address {
    /// Placeholder for no address: `::` in the raw form, which differs from 0.0.0.0 ([`Address::ANY`]).
    pub const NONE: Self = Self { octets: [0; 16] };
    /// Wildcard for the addresses of all endpoints: 0.0.0.0, which no endpoint can have.
    pub const ANY: Self = Self::from_ipv4([0; 4]);

    /// Returns the first and the second eight octets as words in memory order.
    #[inline(always)]
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "takes the lower half")]
    pub fn halves(self) -> [u64; 2] {
        let both = u128::from_ne_bytes(self.octets);
        [both as u64, (both >> 64) as u64]
    }

    /// Creates an address from the octets of an IPv4 address, in network byte order.
    #[inline(always)]
    #[must_use]
    pub const fn from_ipv4(octets: [u8; 4]) -> Self {
        // One 128-bit number, because LLVM clears an array with a call to memset, which BPF does not have.
        Self { octets: (0xffff_0000_0000 | u32::from_be_bytes(octets) as u128).to_be_bytes() }
    }

    /// Creates an address from the octets of an IPv6 address, in network byte order. Extracts an embedded IPv4 address.
    #[inline(always)]
    #[must_use]
    pub fn from_ipv6(octets: [u8; 16]) -> Self {
        match Destination::from_ipv6(octets) {
            Destination::V4(word) => Self::from_ipv4(word.to_ne_bytes()),
            Destination::V6(..) => Self { octets },
        }
    }

    /// Creates an address from the octets of an IPv6 address, in network byte order, without a conversion.
    #[inline(always)]
    pub(crate) const fn from_octets(octets: [u8; 16]) -> Self {
        Self { octets }
    }

    /// Returns the octets, in network byte order. An IPv4 address is in the IPv4-mapped form.
    #[must_use]
    pub const fn octets(self) -> [u8; 16] {
        self.octets
    }

    /// Returns the octets of an IPv4 address, in network byte order, or `None` for an IPv6 address.
    #[must_use]
    pub fn ipv4(self) -> Option<[u8; 4]> {
        match Destination::from_ipv6(self.octets) {
            Destination::V4(word) => Some(word.to_ne_bytes()),
            Destination::V6(..) => None,
        }
    }

    /// Returns the address with bounds that the verifier does not know, see [`Packet::verifier_opaque`].
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "usize has 64 bits on BPF")]
    pub(crate) fn hide_bounds<P: Packet + ?Sized>(self, packet: &P) -> Self {
        let [low, high] = self.halves().map(|half| packet.verifier_opaque(half as usize) as u64);
        Self { octets: (u128::from(low) | u128::from(high) << 64).to_ne_bytes() }
    }

    /// Returns the hash of the address: its bit in the [`PolicyFilter`](crate::PolicyFilter).
    #[must_use]
    pub fn slot(self) -> u16 {
        Destination::from_ipv6(self.octets).slot()
    }
}

/// An address in registers, as the fast path loads it: words in memory order.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Destination {
    /// IPv4 address, also one embedded in an IPv6 address.
    V4(u32),
    /// The first and the second eight octets of any other IPv6 address.
    V6(u64, u64),
}

impl Destination {
    #[inline(always)]
    #[expect(clippy::indexing_slicing, reason = "both ranges of eight octets are within the sixteen")]
    pub(crate) fn from_ipv6(octets: [u8; 16]) -> Self {
        let half = |start: usize| u64::from_ne_bytes(core::array::from_fn(|index| octets[start + index]));
        Self::from_halves(half(0), half(8))
    }

    /// Creates a destination from the first and the second eight octets of an IPv6 address.
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
        // Zero is the IPv4-compatible form (RFC 4291 section 2.5.5.1), which sit tunnels decapsulate. `::` and `::1`
        // become 0.0.0.0 and 0.0.0.1, which no endpoint can have.
        match u32::from_ne_bytes(third) {
            0 => Self::V4(u32::from_ne_bytes(v4)),
            MAPPED if first == 0 => Self::V4(u32::from_ne_bytes(v4)),
            _ => Self::V6(first, second),
        }
    }

    /// Returns a 16-bit hash, which differs for consecutive addresses.
    ///
    /// XOR folding is the cheapest hash of 32 bits. For 128 bits, one multiplication by 2^64 divided by the golden ratio
    /// (Fibonacci hashing) takes half the instructions of folding, and its upper bits depend on all bits of the address.
    #[inline(always)]
    pub(crate) fn slot(self) -> u16 {
        const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;
        match self {
            Self::V4(word) => low_16(u64::from(word ^ (word >> 16))),
            Self::V6(first, second) => low_16((first ^ second).wrapping_mul(MULTIPLIER) >> 48),
        }
    }

    #[inline(always)]
    pub(crate) fn address(self) -> Address {
        // Builds the octets from two registers, because LLVM fills an array with a call to memset, which BPF does not have.
        let (first, second) = match self {
            Self::V4(word) => (0, u64::from(MAPPED.to_le()) | u64::from(word.to_le()) << 32),
            Self::V6(first, second) => (first.to_le(), second.to_le()),
        };
        Address { octets: (u128::from(first) | u128::from(second) << 64).to_le_bytes() }
    }
}

/// Reports whether an IPv6 address with these first eight octets may embed an IPv4 address.
///
/// Tests the first 16 bits for all embedding forms at once. A few other addresses pass too, but none in `2001::/16`,
/// `2400::/6` or `fc00::/7`.
#[inline(always)]
pub(crate) const fn may_embed_ipv4(first: u64) -> bool {
    const PREFIXES: u16 = first_16(NAT64) | SIX_TO_FOUR;
    first_16(first) & !PREFIXES == 0
}

/// Returns the first two of eight octets as a word in memory order.
#[inline(always)]
const fn first_16(octets: u64) -> u16 {
    let [first, second, ..] = octets.to_ne_bytes();
    u16::from_ne_bytes([first, second])
}

#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "the hash is in the low bits")]
const fn low_16(word: u64) -> u16 {
    word as u16
}

const _: () = assert!(size_of::<Address>() == 16);
