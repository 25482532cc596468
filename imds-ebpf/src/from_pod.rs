//! The `from_pod` hook: every packet here was sent, or forwarded, by the pod behind the interface.

use aya_ebpf::{
    bindings::{__sk_buff, TC_ACT_UNSPEC},
    programs::TcContext,
};
use imds_ebpf_common::{Examined, Frame, Hook, Subject, SubjectKind, examine, is_plainly_foreign};

use crate::{
    edge::{Judged, conclude, conclude_probe},
    exempt, maps,
    packet::Skb,
    probe,
    reject::Way,
};

/// Judges a packet like [`imds_ebpf_common::judge`], in two functions: registers and stack of the second one would cost
/// every packet some instructions.
#[inline(always)]
pub(crate) fn judge(ctx: &TcContext, frame: Frame) -> i32 {
    let skb = ctx.skb.skb;
    if is_plainly_foreign(&Skb::new(skb), frame, &maps::Maps) {
        return TC_ACT_UNSPEC;
    }
    match frame {
        Frame::Ethernet => in_ethernet(skb),
        Frame::Ip => without_link_layer(skb),
    }
}

#[inline(never)]
fn in_ethernet(skb: *mut __sk_buff) -> i32 {
    judge_thoroughly(skb, Frame::Ethernet)
}

#[inline(never)]
fn without_link_layer(skb: *mut __sk_buff) -> i32 {
    judge_thoroughly(skb, Frame::Ip)
}

#[inline(always)]
fn judge_thoroughly(skb: *mut __sk_buff, frame: Frame) -> i32 {
    let (packet, hook) = (Skb::new(skb), Hook::FromPod);
    let Some(examined) = examine(&packet, frame, &maps::Maps) else { return TC_ACT_UNSPEC };
    let Examined { place, destination, verdict } = examined;
    let pod = Subject::new(SubjectKind::Interface, packet.ifindex().into());
    if let Some(probed) = probe::judge(pod, hook, verdict) {
        exempt::set_mark(skb, u32::from(probed.is_marked));
        return conclude_probe(probed.verdict);
    }
    let verdict = exempt::at_from_pod(skb, place, verdict, &destination);
    let counter = maps::count(packet.ifindex(), hook, verdict, packet.len());
    // One interface is one source here, so that its counter contains the rate limit too.
    // SAFETY: the map owns the counter, and nothing frees it under a running program.
    let window = counter.map(|counter| unsafe { &raw mut (*counter).window });
    conclude(&Judged { skb, frame, place, hook, verdict }, window, Way::Out)
}
