//! Link layer of packets: the kind of the first header, the EtherType, and the position of the IP header.

use network_types::eth::EthHdr;

use crate::packet::Packet;

// EtherTypes in memory order, so that comparisons need no byte swap.
pub(crate) const ETH_P_IP: u16 = 0x0800_u16.to_be();
pub(crate) const ETH_P_IPV6: u16 = 0x86dd_u16.to_be();
const ETH_P_8021Q: u16 = 0x8100_u16.to_be();
const ETH_P_8021AD: u16 = 0x88a8_u16.to_be();
// Pre-standard QinQ types. Linux does not untag them, but a switch behind a node with a bridge may.
const ETH_P_QINQ1: u16 = 0x9100_u16.to_be();
const ETH_P_QINQ2: u16 = 0x9200_u16.to_be();
const ETH_P_QINQ3: u16 = 0x9300_u16.to_be();

/// First header of packets at the hook: a property of the interface, not of the packet.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum LinkLayer {
    /// An Ethernet header (veth, physical and bridge interfaces).
    Ethernet,
    /// An IP header: the interface has no link layer (`ARPHRD_NONE`: tun, `WireGuard`, netkit in L3 mode).
    None,
}

impl LinkLayer {
    /// Returns the length of the link-layer header in bytes.
    #[inline(always)]
    pub(crate) const fn header_len(self) -> usize {
        match self {
            Self::Ethernet => EthHdr::LEN,
            Self::None => 0,
        }
    }
}

/// Returns the EtherType of an IP header by its version, which is in the first of two bytes; 0 for another version.
#[inline(always)]
pub(crate) const fn ether_type_of_ip(first: u16) -> u16 {
    let [version_ihl, _] = first.to_ne_bytes();
    match version_ihl >> 4 {
        4 => ETH_P_IP,
        6 => ETH_P_IPV6,
        _ => 0,
    }
}

/// Position and version of an IP header in one number, which fits in one register of a BPF function.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct IpOffset(u32);

impl IpOffset {
    const IS_V6: u32 = 1 << 31;

    /// Creates the offset of an IPv4 header that starts `offset` bytes after the start of the packet.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "the header starts after a few tags at most")]
    pub(crate) const fn v4(offset: usize) -> Self {
        Self(offset as u32)
    }

    /// Creates the offset of an IPv6 header that starts `offset` bytes after the start of the packet.
    #[inline(always)]
    pub(crate) const fn v6(offset: usize) -> Self {
        Self(Self::v4(offset).0 | Self::IS_V6)
    }

    /// Returns the start of the header in bytes from the start of the packet; 0 if the packet has no link-layer header.
    #[inline(always)]
    #[must_use]
    pub const fn offset(self) -> usize {
        (self.0 & !Self::IS_V6) as usize
    }

    /// Reports whether the header belongs to IPv6.
    #[inline(always)]
    #[must_use]
    pub const fn is_v6(self) -> bool {
        self.0 & Self::IS_V6 != 0
    }

    /// Returns the offset with bounds that the verifier does not know, see [`Packet::verifier_opaque`].
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "the value has 32 bits")]
    #[must_use]
    pub fn hide_bounds<P: Packet + ?Sized>(self, packet: &P) -> Self {
        Self(packet.verifier_opaque(self.0 as usize) as u32)
    }
}

/// Reports whether a VLAN tag follows this EtherType, in memory order.
#[inline(always)]
#[must_use]
pub const fn is_vlan(ether_type: u16) -> bool {
    matches!(ether_type, ETH_P_8021Q | ETH_P_8021AD | ETH_P_QINQ1 | ETH_P_QINQ2 | ETH_P_QINQ3)
}
