//! Code shared by the two TC hooks: finds the IP header, and reports and answers packets to protected endpoints.

use aya_ebpf::{
    bindings::{__sk_buff, TC_ACT_SHOT, TC_ACT_UNSPEC},
    programs::TcContext,
};
use imds_ebpf_common::{
    DenyAction, Hook, IpOffset, LinkLayer, Packet, Verdict, event::RateLimiter, find_header,
    is_unrelated_fast, is_unrelated_frame,
};

use crate::{
    diagnostics, events, maps,
    reject::{self, ReplyDirection},
};

/// TC hook that gives a verdict on packets.
pub(crate) trait TcProgram {
    /// Socket buffer of the hook.
    type Packet: Packet;

    /// Creates the socket buffer from the context of the running program.
    fn packet(skb: *mut __sk_buff) -> Self::Packet;

    /// Gives a verdict on a packet with an IP header at `ip` that may go to a protected endpoint. Returns the TC action.
    ///
    /// Implementations are separate functions, so that the verifier checks them once for all positions of the header.
    fn classify_header(skb: *mut __sk_buff, ip: IpOffset) -> i32;
}

/// Gives a verdict on a packet at the hook `H`. Returns the TC action.
///
/// The slow path is in separate functions: inlined, its registers and stack would cost every packet some instructions.
#[inline(always)]
pub(crate) fn classify<H: TcProgram>(ctx: &TcContext, link_layer: LinkLayer) -> i32 {
    let skb = ctx.skb.skb;
    if is_unrelated_fast(&H::packet(skb), link_layer, &maps::Maps) {
        return TC_ACT_UNSPEC;
    }
    match link_layer {
        LinkLayer::Ethernet => classify_ethernet::<H>(skb),
        LinkLayer::None => classify_without_link_layer::<H>(skb),
    }
}

#[inline(never)]
fn classify_ethernet<H: TcProgram>(skb: *mut __sk_buff) -> i32 {
    if is_unrelated_frame(&H::packet(skb), &maps::Maps) {
        return TC_ACT_UNSPEC;
    }
    classify_frame::<H>(skb, LinkLayer::Ethernet)
}

#[inline(never)]
fn classify_without_link_layer<H: TcProgram>(skb: *mut __sk_buff) -> i32 {
    classify_frame::<H>(skb, LinkLayer::None)
}

#[inline(always)]
fn classify_frame<H: TcProgram>(skb: *mut __sk_buff, link_layer: LinkLayer) -> i32 {
    let packet = H::packet(skb);
    match find_header(&packet, link_layer) {
        Some(ip) => H::classify_header(skb, ip.hide_bounds(&packet)),
        None => TC_ACT_UNSPEC,
    }
}

/// A packet to a protected endpoint that the node did not send.
pub(crate) struct Classified {
    pub(crate) skb: *mut __sk_buff,
    pub(crate) ip: IpOffset,
    pub(crate) hook: Hook,
    pub(crate) verdict: Verdict,
}

/// Returns the TC action for a packet of a test sender, which gets no counter, event or reply.
#[inline(always)]
pub(crate) const fn finish_probe(verdict: Verdict) -> i32 {
    match verdict {
        Verdict::Denied => TC_ACT_SHOT,
        Verdict::Unrelated | Verdict::Audited | Verdict::Off | Verdict::Allowed | Verdict::Exempt => {
            TC_ACT_UNSPEC
        }
    }
}

/// Emits an event and sends a reply, within the rate limits of the source. Returns the TC action.
///
/// Packets that are not denied get `TC_ACT_UNSPEC`, which continues with the next program on the hook. `TC_ACT_OK` would skip
/// it.
#[inline(always)]
pub(crate) fn finish(
    classified: &Classified,
    limiter: Option<*mut RateLimiter>,
    direction: ReplyDirection,
) -> i32 {
    let &Classified { skb, ip, hook, verdict } = classified;
    // SAFETY: the rate limiter belongs to this CPU, and the map does not free it while the program that looked it up runs.
    let mut limiter = limiter.map(|limiter| unsafe { &mut *limiter });
    match &mut limiter {
        Some(limiter) => events::report_packet(skb, ip, hook, verdict, limiter),
        None => diagnostics::warn_map_full(hook as u32),
    }
    match verdict {
        Verdict::Denied => {}
        Verdict::Unrelated | Verdict::Audited | Verdict::Off | Verdict::Allowed | Verdict::Exempt => {
            return TC_ACT_UNSPEC;
        }
    }
    let may_reply = maps::on_deny() == DenyAction::Reject && limiter.is_some_and(RateLimiter::allow_reply);
    if may_reply { reject::send_reply(skb, ip, direction) } else { TC_ACT_SHOT }
}
