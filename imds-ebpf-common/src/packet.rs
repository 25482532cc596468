//! The packet parser: finds the IPv4 destination of a frame, and nothing else.

use core::mem::offset_of;

use network_types::{eth::EthHdr, ip::Ipv4Hdr};

/// Most VLAN tags that are looked through.
///
/// Linux lets at most 8 devices stack on one another (`MAX_NEST_DEV`, include/linux/netdevice.h), so a frame with
/// more tags than that reaches no IP stack.
pub const MAX_VLAN_TAGS: usize = 8;

// EtherTypes as they are in memory: compared without a byte swap.
const ETH_P_IP: u16 = 0x0800_u16.to_be();
const ETH_P_8021Q: u16 = 0x8100_u16.to_be();
const ETH_P_8021AD: u16 = 0x88a8_u16.to_be();
// The pre-standard QinQ types. Linux does not untag them, but a switch behind a bridged node may.
const ETH_P_QINQ1: u16 = 0x9100_u16.to_be();
const ETH_P_QINQ2: u16 = 0x9200_u16.to_be();
const ETH_P_QINQ3: u16 = 0x9300_u16.to_be();

const VLAN_TAG_LEN: usize = 4;
const DESTINATION_OFFSET: usize = offset_of!(Ipv4Hdr, dst_addr);

/// Bytes of a packet, from where the hook sees them.
///
/// Implemented by the TC context in the BPF programs and by byte slices on the host.
pub trait Packet {
    /// Reads `N` bytes at `offset` from the start of the packet, or `None` where the packet is shorter.
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]>;

    /// Reads a 16-bit and a 32-bit word, as they are in memory, at two offsets of which the second is the greater.
    ///
    /// Both at once, so that an implementation need compare the packet's length but once.
    #[inline(always)]
    fn read_words(&self, first: usize, second: usize) -> Option<(u16, u32)> {
        Some((u16::from_ne_bytes(self.read(first)?), u32::from_ne_bytes(self.read(second)?)))
    }
}

impl Packet for [u8] {
    #[inline]
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.get(offset..)?.first_chunk().copied()
    }
}

/// What a packet starts with at the hook: a property of the interface, not of the packet.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Frame {
    /// An Ethernet header (veth, physical and bridge interfaces).
    Ethernet,
    /// An IP header: the interface has no link layer (`ARPHRD_NONE`: tun, `WireGuard`, netkit in L3 mode).
    Ip,
}

/// The IPv4 destination of `packet` in network byte order, or `None` where it is no IPv4 packet or is cut off before
/// its destination.
///
/// Version and header length are not looked at: the destination is at a fixed place, and what an EtherType calls IPv4
/// is judged as such, however broken the rest is. For [`Frame::Ip`] there is no EtherType, so there the version is
/// what tells IPv4.
#[inline(always)]
#[must_use]
pub fn ipv4_destination<P: Packet + ?Sized>(packet: &P, frame: Frame) -> Option<[u8; 4]> {
    match frame {
        Frame::Ethernet => in_ethernet(packet),
        Frame::Ip => {
            let (word, destination) = packet.read_words(0, DESTINATION_OFFSET)?;
            let [version_ihl, _] = word.to_ne_bytes();
            (version_ihl >> 4 == 4).then_some(destination.to_ne_bytes())
        }
    }
}

#[inline(always)]
fn in_ethernet<P: Packet + ?Sized>(packet: &P) -> Option<[u8; 4]> {
    // At each depth the destination is read along with the EtherType that says whether it is one: a packet that is too
    // short for it has none behind more tags either.
    let (ether_type, destination) = at_depth(packet, 0)?;
    if ether_type == ETH_P_IP {
        return Some(destination);
    }
    if !is_vlan(ether_type) {
        return None;
    }
    for tags in 1..=MAX_VLAN_TAGS {
        let (ether_type, destination) = at_depth(packet, tags)?;
        if ether_type == ETH_P_IP {
            return Some(destination);
        }
        if !is_vlan(ether_type) {
            return None;
        }
    }
    None
}

/// The EtherType behind so many VLAN tags, and where the destination is if that is IPv4.
#[inline(always)]
fn at_depth<P: Packet + ?Sized>(packet: &P, tags: usize) -> Option<(u16, [u8; 4])> {
    let header = EthHdr::LEN + tags * VLAN_TAG_LEN;
    let (ether_type, destination) =
        packet.read_words(header - size_of::<u16>(), header + DESTINATION_OFFSET)?;
    Some((ether_type, destination.to_ne_bytes()))
}

#[inline(always)]
const fn is_vlan(ether_type: u16) -> bool {
    matches!(ether_type, ETH_P_8021Q | ETH_P_8021AD | ETH_P_QINQ1 | ETH_P_QINQ2 | ETH_P_QINQ3)
}
