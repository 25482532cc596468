//! Senders that are exempt.

use aya_ebpf::bindings::__sk_buff;
use imds_ebpf_common::{Subject, SubjectKind, Verdict};

use crate::{
    maps,
    netns::{self, Sender},
    packet::Skb,
};

/// The verdict on a packet at the pod edge, where it would be `verdict` if nobody were exempt. One that is exempt is
/// marked for the node edge, and no other packet has the mark when it leaves here.
#[inline(always)]
pub(crate) fn at_pod_edge(skb: *mut __sk_buff, verdict: Verdict, endpoint: u32) -> Verdict {
    Verdict::from_u32(look_at_pod_edge(skb, verdict as u32, endpoint)).without_origin(&Skb::new(skb))
}

/// The same at the node edge.
#[inline(always)]
pub(crate) fn at_node_edge(skb: *mut __sk_buff, verdict: Verdict, endpoint: u32) -> Verdict {
    Verdict::from_u32(look_at_node_edge(skb, verdict as u32, endpoint)).without_origin(&Skb::new(skb))
}

/// The same for a call on a socket of the network namespace with this cookie.
#[inline(always)]
pub(crate) fn at_socket(cookie: u64, verdict: Verdict, endpoint: u32) -> Verdict {
    if !maps::has_exemptions() {
        return verdict;
    }
    Verdict::from_u32(soften(cookie, SubjectKind::Netns as u64, verdict as u32, endpoint))
}

/// Only what is exempt has the mark behind the pod edge. The kernel takes all marks off what comes from another network
/// namespace, unless netkit is told not to.
#[inline(never)]
pub(crate) fn forget_mark(skb: *mut __sk_buff) {
    let packet = Skb::new(skb);
    packet.set_mark(packet.mark() & !maps::mark());
}

#[inline(never)]
fn look_at_pod_edge(skb: *mut __sk_buff, verdict: u32, endpoint: u32) -> u32 {
    let packet = Skb::new(skb);
    forget_mark(skb);
    if !maps::has_exemptions() {
        return verdict;
    }
    let softened = soften(packet.ifindex().into(), SubjectKind::Interface as u64, verdict, endpoint);
    if softened != verdict {
        packet.set_mark(packet.mark() | maps::mark());
    }
    softened
}

/// The mark is believed of what came in by an interface only, which has been at a pod edge: the kernel takes the mark off
/// what comes from another network namespace by a pair of links, but leaves a pod's on what it sends by macvlan.
#[inline(never)]
fn look_at_node_edge(skb: *mut __sk_buff, verdict: u32, endpoint: u32) -> u32 {
    if !maps::has_exemptions() {
        return verdict;
    }
    let packet = Skb::new(skb);
    let (id, kind) = if packet.ingress_ifindex() != 0 {
        (u64::from(packet.ingress_ifindex()), SubjectKind::Interface)
    } else if let Sender::Netns(cookie) = netns::sender(skb) {
        (cookie, SubjectKind::Netns)
    } else {
        // What nobody is known to have sent.
        return verdict;
    };
    let softened = soften(id, kind as u64, verdict, endpoint);
    let (mark, bit) = (packet.mark(), maps::mark());
    if mark & bit == 0 {
        return softened;
    }
    packet.set_mark(mark & !bit);
    let is_forwarded = packet.ingress_ifindex() != 0;
    if is_forwarded && softened == verdict && is_to_be_softened(verdict) {
        return Verdict::Exempt as u32;
    }
    softened
}

/// Whether there is anything to be exempt from.
#[inline(always)]
const fn is_to_be_softened(verdict: u32) -> bool {
    verdict == Verdict::Deny as u32 || verdict == Verdict::Audit as u32
}

/// A function of its own, which is told numbers only: the verifier then follows it once for all that is known of them.
#[inline(never)]
fn soften(id: u64, kind: u64, verdict: u32, endpoint: u32) -> u32 {
    match maps::exemption(&Subject { id, kind }) {
        Some(exemption) => exemption.soften(Verdict::from_u32(verdict), endpoint) as u32,
        None => verdict,
    }
}
