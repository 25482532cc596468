//! `local_service` hook: gives a verdict on packets that sockets of the node receive. Attached while a protected address is
//! local to the node. At `cgroup_skb/ingress` packets have the destination after DNAT and decapsulation, which no other hook
//! sees.

use aya_ebpf::{bindings::__sk_buff, programs::SkBuffContext};
use imds_ebpf_common::{
    CounterKey, EndpointMatch, Hook, LinkLayer, Subject, SubjectKind, Verdict, event::RateLimitKey,
    find_header, is_unrelated_fast, lookup_endpoint,
};

use crate::{
    diagnostics, events, exempt, maps,
    netns::{self, SocketNetns},
    packet::Skb,
    probe,
};

/// Index of loopback in every network namespace (`LOOPBACK_IFINDEX`, include/net/flow.h). Loopback carries the node's own
/// requests, which pass.
const LOOPBACK: u32 = 1;

/// Returns the verdict on a packet. The slow path is a separate function, see [`edge::classify`](crate::edge::judge).
#[inline(always)]
pub(crate) fn classify(ctx: &SkBuffContext) -> Verdict {
    let skb = ctx.skb.skb;
    let packet = Skb::new(skb);
    if is_unrelated_fast(&packet, LinkLayer::None, &maps::Maps) || packet.ifindex() == LOOPBACK {
        return Verdict::Unrelated;
    }
    Verdict::from_u32(classify_slow(skb))
}

#[inline(never)]
fn classify_slow(skb: *mut __sk_buff) -> u32 {
    let (packet, hook) = (Skb::new(skb), Hook::LocalService);
    let Some(ip) = find_header(&packet, LinkLayer::None) else { return Verdict::Unrelated as u32 };
    let ip = ip.hide_bounds(&packet);
    let Some(EndpointMatch { verdict, destination }) = lookup_endpoint(&packet, ip, &maps::Maps) else {
        return Verdict::Unrelated as u32;
    };
    match netns::of_socket_in_cgroup(skb) {
        // The receiver is a pod that serves the protected address itself. The other hooks cover requests to it.
        SocketNetns::Cookie(cookie) if !netns::is_node(cookie) => return Verdict::Unrelated as u32,
        SocketNetns::Cookie(_) | SocketNetns::NoSocket | SocketNetns::Unknown => {}
    }
    let ifindex = packet.ifindex();
    if let Some(probed) = probe::classify(Subject::new(SubjectKind::Interface, ifindex.into()), hook, verdict)
    {
        return probed.verdict as u32;
    }
    let verdict = exempt::by_interface(skb, ip, ifindex, verdict, &destination).hide_bounds(&packet);
    let _uncounted = maps::count(CounterKey::DELETED, hook, verdict, packet.len());
    match events::limiter(&RateLimitKey::new(ifindex.into(), hook, verdict)) {
        // SAFETY: the window belongs to this CPU, and the map does not free it while the program that looked it up runs.
        Some(limiter) => events::packet(skb, ip, hook, verdict, unsafe { &mut *limiter }),
        None => diagnostics::warn_map_full(hook as u32),
    }
    verdict as u32
}
