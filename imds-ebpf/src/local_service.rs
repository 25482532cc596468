//! The `local_service` hook: packets that sockets of the node receive, attached while a protected address is local to the
//! node. At `cgroup_skb/ingress` the destination is the one after DNAT and decapsulation, which no other hook sees.

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

/// Index of loopback in every network namespace (`LOOPBACK_IFINDEX`, include/net/flow.h): the node's own calls.
const LOOPBACK: u32 = 1;

/// Judges a packet in two functions, for the same reason as [`edge`](crate::edge::judge).
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
        // A pod that serves the address itself is another hook's matter.
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
        // SAFETY: the value is this CPU's own, and its map keeps it as long as a program runs that found it.
        Some(window) => events::packet(skb, place, hook, verdict, unsafe { &mut *window }),
        None => diagnostics::unaccounted(hook as u32),
    }
    verdict as u32
}
