//! `local_service` hook: gives a verdict on packets that sockets of the node receive. Attached while a protected address is
//! local to the node. At `cgroup_skb/ingress` packets have the destination after DNAT and decapsulation, which no other hook
//! sees.

use aya_ebpf::{bindings::__sk_buff, programs::SkBuffContext};
use imds_ebpf_common::{
    CounterKey, Examined, Frame, Hook, Subject, SubjectKind, Verdict, event::Source, examine, find_header,
    is_plainly_foreign,
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

/// Returns the verdict on a packet. The slow path is a separate function, see [`edge::judge`](crate::edge::judge).
#[inline(always)]
pub(crate) fn judge(ctx: &SkBuffContext) -> Verdict {
    let skb = ctx.skb.skb;
    let packet = Skb::new(skb);
    if is_plainly_foreign(&packet, Frame::Ip, &maps::Maps) || packet.ifindex() == LOOPBACK {
        return Verdict::Foreign;
    }
    Verdict::from_u32(judge_thoroughly(skb))
}

#[inline(never)]
fn judge_thoroughly(skb: *mut __sk_buff) -> u32 {
    let (packet, hook) = (Skb::new(skb), Hook::LocalService);
    let Some(place) = find_header(&packet, Frame::Ip) else { return Verdict::Foreign as u32 };
    let place = place.without_origin(&packet);
    let Some(Examined { verdict, destination }) = examine(&packet, place, &maps::Maps) else {
        return Verdict::Foreign as u32;
    };
    match netns::of_socket_in_cgroup(skb) {
        // The receiver is a pod that serves the protected address itself. The other hooks cover requests to it.
        SocketNetns::Cookie(cookie) if !netns::is_node(cookie) => return Verdict::Foreign as u32,
        SocketNetns::Cookie(_) | SocketNetns::NoSocket | SocketNetns::Unknown => {}
    }
    let ifindex = packet.ifindex();
    if let Some(probed) = probe::judge(Subject::new(SubjectKind::Interface, ifindex.into()), hook, verdict) {
        return probed.verdict as u32;
    }
    let verdict = exempt::by_interface(skb, place, ifindex, verdict, &destination).without_origin(&packet);
    let _uncounted = maps::count(CounterKey::DEPARTED, hook, verdict, packet.len());
    match events::window(&Source { id: ifindex.into(), hook: hook as u64 }) {
        // SAFETY: the window belongs to this CPU, and the map does not free it while the program that looked it up runs.
        Some(window) => events::packet(skb, place, hook, verdict, unsafe { &mut *window }),
        None => diagnostics::unaccounted(hook as u32),
    }
    verdict as u32
}
