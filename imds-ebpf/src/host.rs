//! `host_network` hook for packets: `cgroup_skb/egress` on the cgroups of Kubernetes pods.
//!
//! [`socket`](crate::socket) covers calls that name a destination. This program covers packets of other senders: raw sockets,
//! protocols without a cgroup hook, and sockets that were connected before the programs were attached.

use aya_ebpf::{bindings::__sk_buff, helpers::generated::bpf_skb_cgroup_id, programs::SkBuffContext};
use imds_ebpf_common::{
    CounterKey, EndpointMatch, Hook, LinkLayer, Subject, SubjectKind, Verdict, event::RateLimitKey,
    find_header, is_unrelated_fast, lookup_endpoint,
};

use crate::{
    diagnostics, events, exempt, maps,
    netns::{self, SocketNetns},
    packet::Skb,
};

/// Returns the verdict on a packet. The slow path is a separate function, see [`edge::classify`](crate::edge::judge).
#[inline(always)]
pub(crate) fn classify(ctx: &SkBuffContext) -> Verdict {
    let skb = ctx.skb.skb;
    if is_unrelated_fast(&Skb::new(skb), LinkLayer::None, &maps::Maps) {
        return Verdict::Unrelated;
    }
    Verdict::from_u32(classify_slow(skb))
}

#[inline(never)]
fn classify_slow(skb: *mut __sk_buff) -> u32 {
    let (packet, hook) = (Skb::new(skb), Hook::HostNetwork);
    let Some(ip) = find_header(&packet, LinkLayer::None) else { return Verdict::Unrelated as u32 };
    let ip = ip.hide_bounds(&packet);
    let Some(EndpointMatch { verdict, destination }) = lookup_endpoint(&packet, ip, &maps::Maps) else {
        return Verdict::Unrelated as u32;
    };
    if !is_of_node(skb) {
        return Verdict::Unrelated as u32;
    }
    // SAFETY: the helper takes the context of a `cgroup_skb` program.
    let id = unsafe { bpf_skb_cgroup_id(skb) };
    let verdict = exempt::apply(verdict, Subject::new(SubjectKind::Cgroup, id), &destination);
    let verdict = verdict.hide_bounds(&packet);
    let _uncounted = maps::count(CounterKey::DELETED, hook, verdict, packet.len());
    match events::limiter(&RateLimitKey::new(id, hook, verdict)) {
        // SAFETY: the window belongs to this CPU, and the map does not free it while the program that looked it up runs.
        Some(limiter) => events::packet(skb, ip, hook, verdict, unsafe { &mut *limiter }),
        None => diagnostics::warn_map_full(hook as u32),
    }
    verdict as u32
}

/// Reports whether the socket belongs to the node's network namespace, or may belong to it.
#[inline(always)]
fn is_of_node(skb: *mut __sk_buff) -> bool {
    match netns::of_socket_in_cgroup(skb) {
        SocketNetns::Cookie(cookie) => netns::is_node(cookie),
        // Before Linux 6.15 the kernel does not report the namespace, so packets of pods with their own network namespace also
        // get a verdict here. For them, only exemptions with cgroup ids apply (`cgroup` and Kubernetes rules).
        SocketNetns::NoSocket | SocketNetns::Unknown => true,
    }
}
