//! The node edge: what leaves the node here was forwarded for a pod, or is the node's own.

use aya_ebpf::{Global, bindings::__sk_buff, helpers::generated::bpf_get_netns_cookie, programs::TcContext};
use imds_ebpf_common::{Frame, Hook, Verdict, examine, is_plainly_foreign};

use crate::{events, maps, netns, packet::Skb};

/// 1 where the kernel lets TC programs ask for a socket's network namespace (Linux 6.13); set by the loader. It is a
/// constant to the verifier, which does not look at the call where it is 0.
#[unsafe(no_mangle)]
static TC_HAS_COOKIE: Global<u8> = Global::new(0);

/// In two functions, as at the pod edge.
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
    if is_of_node(skb) {
        return Verdict::Foreign;
    }
    maps::count(packet.ifindex(), Hook::NodeEdge, verdict, packet.len());
    // SAFETY: the kernel hands every TC program a valid context; the verifier checks the access.
    let origin = unsafe { (*skb).ingress_ifindex };
    events::packet(skb, header.place(), Hook::NodeEdge, verdict, origin);
    verdict
}

/// Whether the node itself sent the packet.
#[inline(always)]
fn is_of_node(skb: *mut __sk_buff) -> bool {
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
    netns::is_node(unsafe { bpf_get_netns_cookie(skb.cast()) })
}
