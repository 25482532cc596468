//! Addresses, ports and protocol of a packet or call, for events.

use crate::opaque::opaque;

/// Addresses, ports and protocol of a packet or call.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Flow {
    /// Source address in network byte order, IPv4 as IPv4-mapped IPv6; unspecified (`::`) if unknown.
    pub source: [u8; 16],
    /// Destination address in network byte order, IPv4 as IPv4-mapped IPv6.
    pub destination: [u8; 16],
    /// Source port in host byte order; 0 if the packet has none or the parser can't find it.
    pub source_port: u16,
    /// Destination port in host byte order; 0 if the packet has none or the parser can't find it.
    pub destination_port: u16,
    /// IP protocol number; [`Flow::UNKNOWN_PROTOCOL`] if the parser can't find it.
    pub protocol: u8,
}

impl Flow {
    /// Placeholder for an unknown protocol: IANA reserves the number 255.
    pub const UNKNOWN_PROTOCOL: u8 = 255;

    /// Creates a flow of which only the destination address is known.
    #[inline(always)]
    #[must_use]
    pub fn to(destination: [u8; 16]) -> Self {
        // Hidden from the compiler, which would write the zeros with a call to memset. BPF does not have it.
        let zero = opaque(0);
        let source = u128::from(zero).to_ne_bytes();
        Self { source, destination, source_port: 0, destination_port: 0, protocol: Self::UNKNOWN_PROTOCOL }
    }
}
