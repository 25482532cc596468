//! Who sends what to whom: for events, once a packet was judged.

use crate::opaque::opaque;

/// Addresses, ports and protocol of a packet or call.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Flow {
    /// Source, IPv4 as IPv4-mapped IPv6 in network byte order; unspecified where that is not known.
    pub source: [u8; 16],
    /// Destination, likewise.
    pub destination: [u8; 16],
    /// Source port in host byte order; 0 where there is none or it can't be found.
    pub source_port: u16,
    /// Destination port, likewise.
    pub destination_port: u16,
    /// IP protocol number; [`Flow::UNKNOWN_PROTOCOL`] where it can't be found.
    pub protocol: u8,
}

impl Flow {
    /// IANA keeps 255 for itself.
    pub const UNKNOWN_PROTOCOL: u8 = 255;

    /// A flow of which nothing but this is known.
    #[inline(always)]
    #[must_use]
    pub fn to(destination: [u8; 16]) -> Self {
        // Hidden from the compiler, which of many zeros in a row makes a call that the verifier refuses.
        let zero = opaque(0);
        let source = u128::from(zero).to_ne_bytes();
        Self { source, destination, source_port: 0, destination_port: 0, protocol: Self::UNKNOWN_PROTOCOL }
    }
}
