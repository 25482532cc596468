//! `local_service` hook: gives a verdict on packets that sockets of the node receive. Attached while a protected address is
//! local to the node. At `cgroup_skb/ingress` packets have the destination after DNAT and decapsulation, which no other hook
//! sees.

use aya_ebpf::{bindings::__sk_buff, programs::SkBuffContext};
use imds_ebpf_common::{EndpointMatch, Hook, Subject, SubjectKind, Verdict};

use crate::{
    cgroup_packet, exempt,
    netns::{self, SocketNetns},
    packet::Skb,
    probe,
};

/// Index of loopback in every network namespace (`LOOPBACK_IFINDEX`, include/net/flow.h). Loopback carries the node's own
/// requests, which pass.
const LOOPBACK: u32 = 1;

/// Returns the verdict on a packet.
#[inline(always)]
pub(crate) fn classify(ctx: &SkBuffContext) -> Verdict {
    cgroup_packet::classify(ctx, |skb| {
        if Skb::new(skb).ifindex() == LOOPBACK { Verdict::Unrelated as u32 } else { classify_slow(skb) }
    })
}

#[inline(never)]
fn classify_slow(skb: *mut __sk_buff) -> u32 {
    let (packet, hook) = (Skb::new(skb), Hook::LocalService);
    let Some((ip, EndpointMatch { verdict, destination })) = cgroup_packet::find_endpoint(&packet) else {
        return Verdict::Unrelated as u32;
    };
    match netns::from_socket_in_cgroup(skb) {
        // The receiver is a pod that serves the protected address itself. The other hooks cover requests to it.
        SocketNetns::Cookie(cookie) if !netns::is_node(cookie) => return Verdict::Unrelated as u32,
        SocketNetns::Cookie(_) | SocketNetns::NoSocket | SocketNetns::Unknown => {}
    }
    let ifindex = packet.ifindex();
    if let Some(probed) = probe::classify(Subject::new(SubjectKind::Interface, ifindex.into()), hook, verdict)
    {
        return probed.verdict as u32;
    }
    let verdict = exempt::apply_by_interface(skb, ip, ifindex, verdict, &destination).hide_bounds(&packet);
    cgroup_packet::report(skb, ip, ifindex.into(), hook, verdict)
}
