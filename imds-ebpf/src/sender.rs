//! Senders at `node_egress`: the node itself, or a pod and how it is known.

use aya_ebpf::bindings::__sk_buff;
use imds_ebpf_common::Role;

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

/// Returns who sent a packet that leaves the node; `None` for the node itself.
///
/// A packet can leave through several interfaces of the node (bridge and NIC, bond and slave, VLAN and NIC). The answer
/// depends only on the packet's socket and ingress interface, which stay, so that each hook gives the same verdict.
#[inline(always)]
pub(crate) fn of(packet: &Skb, skb: *mut __sk_buff) -> Option<Sender> {
    match netns::of_socket(skb) {
        SocketNetns::Cookie(cookie) => (!netns::is_node(cookie)).then_some(Sender { cookie }),
        // TC redirected it to an ifb device and back, after this hook has let it pass.
        SocketNetns::NoSocket if is_redirected(packet.ingress_ifindex()) => None,
        // The node forwards it. Without an ingress interface it can be a pod's too: an IPv6 packet that the node fragments
        // again loses it (ip6_copy_metadata, net/ipv6/ip6_output.c), and ipvlan in layer 3 scrubs it. The few packets that
        // the node sends without a socket, such as IPv6 resets, are denied with them.
        SocketNetns::NoSocket => Some(Sender { cookie: 0 }),
        SocketNetns::Unknown => is_from_pod(packet.ingress_ifindex()).then_some(Sender { cookie: 0 }),
    }
}

/// Reports whether a packet comes back from an ifb device, which sets the ingress interface to itself (`ifb_ri_tasklet`,
/// drivers/net/ifb.c).
#[inline(always)]
fn is_redirected(ingress_ifindex: u32) -> bool {
    ingress_ifindex != 0 && matches!(maps::role(ingress_ifindex), Some(Role::Ifb))
}

/// Decides for a packet with a socket whose network namespace the kernel does not report (before Linux 6.13).
///
/// A routed packet has lost its socket, so that this one comes from the node or was switched by a bridge. Without an
/// ingress interface it is the node's, or that of a macvlan or ipvlan pod, which the socket hook covers. With one that is
/// neither a pod's link nor a bridge, an earlier `node_egress` hook has let it pass: TC redirected it, or it came back by
/// a veth pair inside the node's network namespace.
#[inline(always)]
fn is_from_pod(ingress_ifindex: u32) -> bool {
    if ingress_ifindex == 0 {
        return false;
    }
    match maps::role(ingress_ifindex) {
        Some(Role::Other | Role::Uplink | Role::Ifb | Role::Loopback | Role::Excluded) => false,
        Some(Role::Pod | Role::Bridge) | None => true,
    }
}
