//! `host_network` hook for packets: `cgroup_skb/egress` on the cgroups of Kubernetes pods.
//!
//! [`socket`](crate::socket) covers calls that name a destination. This program covers packets of other senders: raw sockets,
//! protocols without a cgroup hook, and sockets that were connected before the programs were attached.

use aya_ebpf::{bindings::__sk_buff, helpers::generated::bpf_skb_cgroup_id};
use imds_ebpf_common::{EndpointMatch, Hook, Subject, SubjectKind, Verdict};

use crate::{
    cgroup_packet, event_source, exempt,
    netns::{self, SocketNetns},
    packet::Skb,
};

/// Returns the number of the verdict on a packet. Called by [`cgroup_packet::classify`].
#[inline(never)]
pub(crate) fn classify_slow(skb: *mut __sk_buff) -> u32 {
    let (packet, hook) = (Skb::new(skb), Hook::HostNetwork);
    let Some((ip, EndpointMatch { verdict, destination })) = cgroup_packet::find_endpoint(&packet) else {
        return Verdict::Unrelated as u32;
    };
    if !is_in_node_netns(skb) {
        return Verdict::Unrelated as u32;
    }
    // SAFETY: the helper takes the context of a `cgroup_skb` program.
    let id = unsafe { bpf_skb_cgroup_id(skb) };
    let verdict = exempt::apply(verdict, Subject::new(SubjectKind::Cgroup, id), &destination);
    let verdict = verdict.hide_bounds(&packet);
    cgroup_packet::report(skb, ip, event_source::of_packet(skb, id), hook, verdict)
}

/// Reports whether the socket belongs to the node's network namespace, or may belong to it.
#[inline(always)]
fn is_in_node_netns(skb: *mut __sk_buff) -> bool {
    match netns::from_socket_in_cgroup(skb) {
        SocketNetns::Cookie(cookie) => netns::is_node(cookie),
        // Before Linux 6.15 the kernel does not report the namespace, so packets of pods with their own network namespace also
        // get a verdict here. For them, only exemptions with cgroup ids apply (`cgroup` and Kubernetes rules).
        SocketNetns::NoSocket | SocketNetns::Unknown => true,
    }
}
