//! Hand-over from one hook to the next: the hash of packets that a hook has let pass.
//!
//! A sender can't choose `skb->hash`: the kernel takes it from a random number of the socket, or computes it with a random key
//! (`net_tx_rndhash`, `__skb_get_hash_net`). Only programs with `CAP_BPF` on the node write it, and no firewall rule does. A packet keeps
//! it on its way through the node: across bridges, routing, NAT, ifb devices and veth pairs (`skb_scrub_packet` leaves it).
//!
//! All packets with this hash share a queue of the interface. Only requests to protected endpoints get it.

use aya_ebpf::{
    bindings::__sk_buff,
    helpers::generated::{bpf_set_hash, bpf_set_hash_invalid},
};
use imds_ebpf_common::PASSED_HASH;

use crate::packet::Skb;

/// Reports whether an earlier hook has let the packet pass.
#[inline(always)]
pub(crate) fn is_passed(skb: *mut __sk_buff) -> bool {
    Skb::new(skb).hash() == PASSED_HASH
}

/// Sets the hash by which [`is_passed`] recognizes the packet, or ends that if `passes` is 0. A separate function, so that the verifier
/// checks it apart from its callers.
#[inline(never)]
pub(crate) fn set_passed(skb: *mut __sk_buff, passes: u32) {
    if passes != 0 {
        // SAFETY: the kernel passes a valid context.
        unsafe { bpf_set_hash(skb, PASSED_HASH) };
    } else if is_passed(skb) {
        // SAFETY: the kernel passes a valid context.
        unsafe { bpf_set_hash_invalid(skb) };
    }
}
