//! The node edge: what leaves the node here was forwarded for a pod, or is the node's own.

use aya_ebpf::{Global, bindings::__sk_buff, helpers::generated::bpf_get_netns_cookie, programs::TcContext};
use imds_ebpf_common::{Frame, Hook, Verdict};

use crate::{maps, netns, packet::Skb};

/// 1 where the kernel lets TC programs ask for a socket's network namespace (Linux 6.13); set by the loader. It is a
/// constant to the verifier, which does not look at the call where it is 0.
#[unsafe(no_mangle)]
static TC_HAS_COOKIE: Global<u8> = Global::new(0);

#[inline(always)]
pub(crate) fn judge(ctx: &TcContext, frame: Frame) -> Verdict {
    let skb = Skb::new(ctx);
    // The destination comes first: it is what lets almost every packet go at once.
    let verdict = imds_ebpf_common::judge(&skb, frame, &maps::Maps);
    match verdict {
        Verdict::Foreign => return verdict,
        Verdict::Deny | Verdict::Audit | Verdict::Allow | Verdict::Kept => {}
    }
    if is_of_node(ctx) {
        return Verdict::Foreign;
    }
    maps::count(skb.ifindex(), Hook::NodeEdge, verdict, skb.len());
    verdict
}

/// Whether the node itself sent the packet.
#[inline(always)]
fn is_of_node(ctx: &TcContext) -> bool {
    let skb: *const __sk_buff = ctx.skb.skb;
    // SAFETY: the kernel hands every TC program a valid context; the verifier checks the access.
    let ingress_ifindex = unsafe { (*skb).ingress_ifindex };
    if ingress_ifindex != 0 {
        // It came in by an interface, so it is forwarded.
        return false;
    }
    if TC_HAS_COOKIE.load() == 0 {
        return true;
    }
    #[expect(clippy::multiple_unsafe_ops_per_block, reason = "a union behind a pointer is two")]
    // SAFETY: as above; of the union, which has one field.
    let socket = unsafe { (*skb).__bindgen_anon_2.sk };
    if socket.is_null() {
        // No socket: the kernel's own, such as a reset. A pod's would have come in by an interface.
        return true;
    }
    // SAFETY: the helper takes the context of a TC program.
    netns::is_node(unsafe { bpf_get_netns_cookie(ctx.skb.skb.cast()) })
}
