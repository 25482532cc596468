//! Senders of packets at `node_egress`: separates the node's own packets from packets of pods.

use aya_ebpf::bindings::__sk_buff;
use imds_ebpf_common::{InterfaceRecord, IpOffset, OwnPackets, Packet as _, exemption::PASSED_SOURCES};

use crate::{
    exempt, maps,
    netns::{self, SocketNetns},
    packet::Skb,
    passed::is_passed,
};

/// Sender that is not the node.
#[derive(Clone, Copy)]
pub(crate) struct SocketOwner {
    /// Cookie of the network namespace of the packet's socket; 0 if the packet has no socket, or before Linux 6.13.
    pub(crate) cookie: u64,
}

/// Returns the sender of a packet that leaves the node, or `None` for the node itself.
///
/// A packet can pass several interfaces of the node (bridge and NIC, bond and slave, VLAN and NIC). The result depends only
/// on the packet's socket and ingress interface, so that each hook on its path gives the same verdict. [`is_from_node`] uses
/// the hash for devices that change them.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "usize has 64 bits on BPF")]
pub(crate) fn identify(skb: *mut __sk_buff, ip: IpOffset) -> Option<SocketOwner> {
    let cookie = find_cookie(skb, ip);
    if cookie == NODE {
        return None;
    }
    Some(SocketOwner { cookie: Skb::new(skb).verifier_opaque(cookie as usize) as u64 })
}

/// Result of [`find_cookie`] for packets of the node. No namespace has this cookie, because the kernel numbers cookies from 1.
const NODE: u64 = u64::MAX;

/// Returns [`SocketOwner::cookie`], or [`NODE`]. A separate function, so that the verifier checks it once for all verdicts.
#[inline(never)]
fn find_cookie(skb: *mut __sk_buff, ip: IpOffset) -> u64 {
    match netns::from_socket(skb) {
        SocketNetns::Cookie(cookie) if !netns::is_node(cookie) => cookie,
        socket if is_from_node(skb, ip, socket) => NODE,
        SocketNetns::Cookie(_) | SocketNetns::NoSocket | SocketNetns::Unknown => 0,
    }
}

/// Reports whether a packet counts as the node's own. True for packets of a socket of the node or of a socket whose network
/// namespace the kernel does not report, and for packets that another `node_egress` hook has let pass before.
///
/// Packets that the node routes for a pod have no socket. Packets that return from an ifb device, which sets the ingress
/// interface to itself (`ifb_ri_tasklet`, drivers/net/ifb.c), have none either, and packets that return from a veth pair
/// inside the node's network namespace lose it if bridges call netfilter (`br_netfilter`). Both kinds have passed another
/// `node_egress` hook before, which has set the hash. The record of the interface alone is not sufficient: the interface may
/// be deleted, or moved into a pod, before the agent handles the event. Pods can't choose the hash. The source address must be the node's or an
/// exempt pod's, too: responses go to the owner of that address.
///
/// A bridge that floods a packet, and a bond or team that broadcasts it, send copies without a socket (`skb_clone`), which have
/// passed the hook of that device before.
///
/// Some packets of pods have neither ingress interface nor socket: IPv6 packets that the node fragments again lose the
/// interface (`ip6_copy_metadata`, `net/ipv6/ip6_output.c`), and ipvlan in L3 mode clears it. The few packets that the node
/// sends without a socket, such as IPv6 resets, are therefore denied too. Before Linux 6.13, a packet with a socket can
/// belong to a macvlan or ipvlan pod. The socket hook covers these pods.
#[inline(always)]
fn is_from_node(skb: *mut __sk_buff, ip: IpOffset, socket: SocketNetns) -> bool {
    let packet = Skb::new(skb);
    // Hidden from the verifier, which otherwise follows the rest for each kind of socket.
    let has_socket = packet.verifier_opaque(usize::from(!matches!(socket, SocketNetns::NoSocket))) != 0;
    let ingress_ifindex = packet.ingress_ifindex();
    if ingress_ifindex == 0 {
        return has_socket || is_passed_copy(skb, packet.ifindex()) != 0;
    }
    let Some(record) = maps::interface(ingress_ifindex) else { return false };
    if record.own_packets == OwnPackets::Passed as u8 {
        return is_passed(skb) && exempt::is_source_of(skb, ip, PASSED_SOURCES);
    }
    has_socket && record.own_packets == OwnPackets::WithSocket as u8
}

/// Returns 1 for a passed packet that leaves by a port to which a bridge, bond or team sends copies, else 0. A separate
/// function, so that the verifier checks it once.
#[inline(never)]
fn is_passed_copy(skb: *mut __sk_buff, ifindex: u32) -> u32 {
    let sends_copies = |record: &InterfaceRecord| record.sends_copies != 0;
    u32::from(is_passed(skb) && maps::interface(ifindex).is_some_and(sends_copies))
}
