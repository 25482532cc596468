//! Senders at `node_egress`: the node itself, or a pod and how it is known.

use aya_ebpf::bindings::__sk_buff;
use imds_ebpf_common::{OwnPackets, Packet as _};

use crate::{
    maps,
    netns::{self, SocketNetns},
    packet::Skb,
};

/// A sender that is not the node.
#[derive(Clone, Copy)]
pub(crate) struct Sender {
    /// Cookie of the network namespace of the packet's socket; 0 if the packet has no socket, or before Linux 6.13.
    pub(crate) cookie: u64,
}

/// Returns the sender of a packet that leaves the node; `None` for the node itself.
///
/// A packet can leave through several interfaces of the node (bridge and NIC, bond and slave, VLAN and NIC). The answer
/// depends only on the packet's socket and ingress interface, which stay, so that each hook gives the same verdict.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "BPF has words of 64 bits")]
pub(crate) fn of(skb: *mut __sk_buff) -> Option<Sender> {
    let cookie = cookie(skb);
    if cookie == NODE {
        return None;
    }
    Some(Sender { cookie: Skb::new(skb).forget_origin(cookie as usize) as u64 })
}

/// Result of [`cookie`] for packets of the node. The kernel numbers cookies from 1, so that no namespace has it.
const NODE: u64 = u64::MAX;

/// Returns [`Sender::cookie`], or [`NODE`]. A separate function, so that the verifier follows it once for all verdicts.
#[inline(never)]
fn cookie(skb: *mut __sk_buff) -> u64 {
    match netns::of_socket(skb) {
        SocketNetns::Cookie(cookie) if !netns::is_node(cookie) => cookie,
        socket if is_nodes(&Skb::new(skb), socket) => NODE,
        SocketNetns::Cookie(_) | SocketNetns::NoSocket | SocketNetns::Unknown => 0,
    }
}

/// Reports whether a packet counts as the node's. True if a socket of the node sent it, or a socket whose network namespace
/// the kernel does not report, or if another `node_egress` hook has let the packet pass before.
///
/// A packet that the node routes for a pod has lost its socket. So has one that comes back from an ifb device, which sets the
/// ingress interface to itself (`ifb_ri_tasklet`, drivers/net/ifb.c), or by a veth pair inside the node's network namespace
/// if bridges call netfilter (`br_netfilter`). Both have left through another `node_egress` hook before, which has set the
/// mark. The record of an interface alone is no proof: the interface can be gone, or moved into a pod, before the agent
/// knows it. The kernel clears the mark of a packet that comes from another network namespace (`skb_scrub_packet`).
///
/// Without an ingress interface, a packet without a socket can be a pod's: an IPv6 packet that the node fragments again loses
/// it (`ip6_copy_metadata`, `net/ipv6/ip6_output.c`), and ipvlan in layer 3 scrubs it. The few packets that the node sends
/// without a socket, such as IPv6 resets, are denied with them. Before Linux 6.13 one with a socket can be that of a macvlan
/// or ipvlan pod, which the socket hook covers.
#[inline(always)]
fn is_nodes(packet: &Skb, socket: SocketNetns) -> bool {
    let has_socket = !matches!(socket, SocketNetns::NoSocket);
    let ingress_ifindex = packet.ingress_ifindex();
    if ingress_ifindex == 0 {
        return has_socket;
    }
    let Some(record) = maps::interface(ingress_ifindex) else { return false };
    if record.own_packets == OwnPackets::Marked as u8 {
        return packet.mark() & maps::mark() != 0;
    }
    has_socket && record.own_packets == OwnPackets::WithSocket as u8
}
