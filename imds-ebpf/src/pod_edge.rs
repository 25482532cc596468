//! The pod edge: all that arrives here was sent by a pod.

use aya_ebpf::{bindings::__sk_buff, programs::TcContext};
use imds_ebpf_common::{Frame, Hook, Verdict, examine, is_plainly_foreign};

use crate::{events, maps, packet::Skb};

/// The same as [`imds_ebpf_common::judge`], in two functions: what the second one needs of registers and stack would
/// cost every packet some instructions.
#[inline(always)]
pub(crate) fn judge(ctx: &TcContext, frame: Frame) -> Verdict {
    let skb = ctx.skb.skb;
    if is_plainly_foreign(&Skb::new(skb), frame, &maps::Maps) {
        return Verdict::Foreign;
    }
    match frame {
        Frame::Ethernet => in_ethernet(skb),
        Frame::Ip => without_link_layer(skb),
    }
}

#[inline(never)]
fn in_ethernet(skb: *mut __sk_buff) -> Verdict {
    judge_and_count(skb, Frame::Ethernet)
}

#[inline(never)]
fn without_link_layer(skb: *mut __sk_buff) -> Verdict {
    judge_and_count(skb, Frame::Ip)
}

#[inline(always)]
fn judge_and_count(skb: *mut __sk_buff, frame: Frame) -> Verdict {
    let packet = Skb::new(skb);
    let Some((verdict, header)) = examine(&packet, frame, &maps::Maps) else { return Verdict::Foreign };
    let ifindex = packet.ifindex();
    maps::count(ifindex, Hook::PodEdge, verdict, packet.len());
    events::packet(skb, header.place(), Hook::PodEdge, verdict, ifindex);
    verdict
}
