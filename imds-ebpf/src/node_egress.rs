//! `node_egress`: what leaves the node here was forwarded for a pod, or is the node's own.

use aya_ebpf::{
    bindings::{__sk_buff, TC_ACT_UNSPEC},
    programs::TcContext,
};
use imds_ebpf_common::{
    Examined, Frame, Hook, Subject, SubjectKind, event::Source, examine, is_plainly_foreign,
};

use crate::{
    edge::{Judged, conclude},
    events, exempt, maps,
    netns::{self, Sender},
    packet::Skb,
    reject::Way,
};

/// In two functions, as at `from_pod`.
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
    let Some(sender) = sender(&packet, skb) else { return TC_ACT_UNSPEC };
    let Examined { place, destination, .. } = examined;
    let verdict = exempt::at_node_egress(skb, sender, examined.verdict, &destination);
    let _uncounted = maps::count(packet.ifindex(), hook, verdict, packet.len());
    let window = events::window(&Source { id: u64::from(packet.ingress_ifindex()), hook: hook as u64 });
    conclude(&Judged { skb, frame, place, hook, verdict }, window, Way::In)
}

/// Who sent the packet, as well as that can be known; `None` for the node itself.
#[inline(always)]
fn sender(packet: &Skb, skb: *mut __sk_buff) -> Option<Subject> {
    let ingress = packet.ingress_ifindex();
    if ingress != 0 {
        // It came in by an interface, so it is forwarded.
        return Some(Subject::new(SubjectKind::Interface, ingress.into()));
    }
    match netns::sender(skb) {
        // What a pod sent can look so, too: an IPv6 packet of which the node makes fragments anew loses the interface by
        // which it came (ip6_copy_metadata, net/ipv6/ip6_output.c), and ipvlan in layer 3 scrubs it. Of the node's own,
        // the few that have no socket, such as the answer to a segment that comes after the end of a connection, are
        // not worth that.
        Sender::None => Some(Subject::NONE),
        Sender::Netns(cookie) => {
            (!netns::is_node(cookie)).then_some(Subject::new(SubjectKind::Netns, cookie))
        }
        // Where the kernel does not tell, macvlan and ipvlan are left to the socket hook.
        Sender::Unknown => None,
    }
}
