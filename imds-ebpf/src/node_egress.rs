//! The `node_egress` hook: a packet that leaves the node here was forwarded for a pod, or is the node's own.

use aya_ebpf::{
    bindings::{__sk_buff, TC_ACT_UNSPEC},
    programs::TcContext,
};
use imds_ebpf_common::{
    Examined, Frame, Hook, Subject, SubjectKind, Verdict, event::Source, examine, is_plainly_foreign,
};

use crate::{
    edge::{Judged, conclude, conclude_probe},
    events, exempt, maps,
    packet::Skb,
    probe::{self, Probed},
    reject::Way,
    sender::{self, Sender},
};

/// Judges a packet in two functions, for the same reason as [`from_pod`](crate::from_pod::judge).
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
    let (packet, hook) = (Skb::new(skb), Hook::NodeEgress);
    let Some(examined) = examine(&packet, frame, &maps::Maps) else { return TC_ACT_UNSPEC };
    let Some(sender) = sender::of(&packet, skb) else { return TC_ACT_UNSPEC };
    let Examined { place, destination, verdict } = examined;
    if let Some(probed) = judge_probe(&packet, sender, verdict) {
        return conclude_probe(probed.verdict);
    }
    let verdict = exempt::at_node_egress(skb, place, sender, verdict, &destination);
    let _uncounted = maps::count(packet.ifindex(), hook, verdict, packet.len());
    let window = events::window(&Source { id: u64::from(packet.ingress_ifindex()), hook: hook as u64 });
    conclude(&Judged { skb, frame, place, hook, verdict }, window, Way::In)
}

/// Judges a packet of a test sender, which is identified like any other sender.
#[inline(always)]
fn judge_probe(packet: &Skb, sender: Sender, verdict: Verdict) -> Option<Probed> {
    if !maps::has_probes() {
        return None;
    }
    let ifindex = u64::from(packet.ingress_ifindex());
    let by_cookie = probe::judge(Subject::new(SubjectKind::Netns, sender.cookie), Hook::NodeEgress, verdict);
    let by_interface =
        || probe::judge(Subject::new(SubjectKind::Interface, ifindex), Hook::NodeEgress, verdict);
    let by_bridge = || {
        let bridge = Subject::new(SubjectKind::Bridge, ifindex);
        (packet.mark() & maps::mark() != 0).then(|| probe::judge(bridge, Hook::NodeEgress, verdict)).flatten()
    };
    by_cookie.or_else(by_interface).or_else(by_bridge)
}
