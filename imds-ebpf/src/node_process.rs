//! `node_allow` hook: only processes in the allow list may reach protected endpoints from the node's network namespace.
//!
//! [`socket`](crate::socket) covers calls that name a destination. The packet program here covers other senders: raw sockets,
//! protocols without a cgroup hook, and sockets that were connected before the programs were attached.

use aya_ebpf::{
    bindings::__sk_buff,
    helpers::generated::{
        bpf_get_current_ancestor_cgroup_id, bpf_get_current_uid_gid, bpf_get_socket_uid,
        bpf_skb_ancestor_cgroup_id, bpf_skb_cgroup_id,
    },
};
use imds_ebpf_common::{
    AllowedKind, AllowedProcess, EndpointMatch, Hook, Packet as _, Subject, SubjectKind, Verdict,
    allow_list::MAX_CGROUP_LEVEL, exemption::can_be_exempted,
};

use crate::{
    cgroup_packet, event_source, exempt, maps,
    netns::{self, SocketNetns},
    packet::Skb,
};

/// Returns the verdict on a call of the current task, given the `verdict` on processes that are not in the allow list.
#[inline(always)]
pub(crate) fn apply_to_caller(verdict: Verdict) -> Verdict {
    if can_be_exempted(verdict) && is_caller_allowed() != 0 { Verdict::Exempt } else { verdict }
}

/// Returns 1 if the allow list has the user or a cgroup of the current task, else 0. A separate function, so that the verifier
/// follows the lookups once.
#[inline(never)]
#[expect(clippy::cast_possible_truncation, reason = "the user ID is the lower half")]
fn is_caller_allowed() -> u32 {
    // SAFETY: the helper takes no arguments. It returns the real user ID in the initial user namespace.
    let uid = unsafe { bpf_get_current_uid_gid() } as u32;
    if maps::is_allowed(&AllowedProcess::new(AllowedKind::Uid, uid.into())) {
        return 1;
    }
    for level in 1..=MAX_CGROUP_LEVEL {
        // SAFETY: the helper takes a number. It returns 0 below the cgroup of the task.
        let id = unsafe { bpf_get_current_ancestor_cgroup_id(level) };
        if id == 0 {
            return 0;
        }
        if maps::is_allowed(&AllowedProcess::new(AllowedKind::Cgroup, id)) {
            return 1;
        }
    }
    0
}

/// Returns the number of the verdict on a packet. Called by [`cgroup_packet::classify`].
#[inline(never)]
#[expect(clippy::cast_possible_truncation, reason = "the number comes back unchanged")]
pub(crate) fn classify_slow(skb: *mut __sk_buff) -> u32 {
    let (packet, hook) = (Skb::new(skb), Hook::NodeAllow);
    let Some((ip, EndpointMatch { verdict, destination })) = cgroup_packet::find_endpoint(&packet) else {
        return Verdict::Unrelated as u32;
    };
    match netns::from_socket_in_cgroup(skb) {
        SocketNetns::Cookie(cookie) if netns::is_node(cookie) => {}
        // The packets of pods pass here too. The agent does not attach the program if the kernel does not report the namespace.
        SocketNetns::Cookie(_) | SocketNetns::NoSocket | SocketNetns::Unknown => {
            return Verdict::Unrelated as u32;
        }
    }
    // SAFETY: the helper takes the context of a `cgroup_skb` program.
    let id = unsafe { bpf_skb_cgroup_id(skb) };
    let verdict = exempt::apply(verdict, Subject::new(SubjectKind::Cgroup, id), &destination);
    let mut verdict = verdict.hide_bounds(&packet);
    if can_be_exempted(verdict) {
        // Hidden from the verifier, which otherwise follows the rest for each result.
        match packet.verifier_opaque(find_sender(skb) as usize) as u32 {
            KERNEL => return Verdict::Unrelated as u32,
            ALLOWED => verdict = Verdict::Exempt,
            _ => {}
        }
    }
    let verdict = verdict.hide_bounds(&packet);
    cgroup_packet::report(skb, ip, event_source::of_packet(skb, id), hook, verdict)
}

/// The allow list has no entry for the sender.
const UNLISTED: u32 = 0;
/// The allow list has the user or a cgroup of the sender.
const ALLOWED: u32 = 1;
/// The kernel itself sent the packet, on a socket of its own.
const KERNEL: u32 = 2;

/// Looks up the socket of a packet in the allow list. A separate function, so that the verifier follows the lookups once.
///
/// The kernel answers segments for closed connections on sockets that it made at boot: they belong to root and to the root
/// cgroup, whichever process had the connection (`inet_ctl_sock_create` in `net/ipv4/af_inet.c`).
#[inline(never)]
fn find_sender(skb: *mut __sk_buff) -> u32 {
    // SAFETY: the helper takes the context of a `cgroup_skb` program.
    let uid = unsafe { bpf_get_socket_uid(skb) };
    if maps::is_allowed(&AllowedProcess::new(AllowedKind::Uid, uid.into())) {
        return ALLOWED;
    }
    for level in 1..=MAX_CGROUP_LEVEL {
        // SAFETY: the helper takes the context of a `cgroup_skb` program, and a number. It returns 0 below the cgroup of the
        // socket.
        let id = unsafe { bpf_skb_ancestor_cgroup_id(skb, level) };
        if id == 0 {
            return if level == 1 && uid == 0 { KERNEL } else { UNLISTED };
        }
        if maps::is_allowed(&AllowedProcess::new(AllowedKind::Cgroup, id)) {
            return ALLOWED;
        }
    }
    UNLISTED
}
