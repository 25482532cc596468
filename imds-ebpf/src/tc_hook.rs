//! Code shared by the two TC hooks: finds the IP header, and reports and answers packets to protected endpoints.

use core::cmp::min;

use aya_ebpf::{
    bindings::{__sk_buff, TC_ACT_SHOT, TC_ACT_UNSPEC},
    helpers::generated::bpf_skb_pull_data,
    programs::TcContext,
};
use imds_ebpf_common::{
    Hook, IpOffset, LinkLayer, NoHeader, Packet, Verdict, by_mode, event::RateLimiter, find_header,
    is_unrelated_fast, is_unrelated_frame, packet::MAX_EXTENSION_HEADERS,
};

use crate::{
    diagnostics, events, maps,
    packet::Skb,
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
    if make_headers_private(skb) != 0 {
        return TC_ACT_SHOT;
    }
    if is_unrelated_frame(&H::packet(skb), &maps::Maps) {
        return TC_ACT_UNSPEC;
    }
    classify_frame::<H>(skb, LinkLayer::Ethernet)
}

#[inline(never)]
fn classify_without_link_layer<H: TcProgram>(skb: *mut __sk_buff) -> i32 {
    if make_headers_private(skb) != 0 {
        return TC_ACT_SHOT;
    }
    classify_frame::<H>(skb, LinkLayer::None)
}

#[inline(always)]
fn classify_frame<H: TcProgram>(skb: *mut __sk_buff, link_layer: LinkLayer) -> i32 {
    let packet = H::packet(skb);
    match find_header(&packet, link_layer) {
        Ok(ip) => H::classify_header(skb, ip.hide_bounds(&packet)),
        // Not counted: the call would cost the verifier more instructions than the programs have left.
        Err(NoHeader::TooManyTags) => action(by_mode(&maps::Maps)),
        Err(NoHeader::NotIp) => TC_ACT_UNSPEC,
    }
}

/// Copies headers that the sender can still change into memory of the kernel. Returns 0, or an error number if memory
/// is short. A separate function, so that the verifier follows the rest once.
///
/// A packet socket with a mapped ring (`PACKET_TX_RING`) keeps all but the link-layer header in pages of the process, which
/// could change the destination while the packet waits in a qdisc. Only the linear part is private. macvlan and ipvlan devices
/// send the pages as they are; veth and netkit devices copy them.
#[inline(never)]
fn make_headers_private(skb: *mut __sk_buff) -> i64 {
    let packet = Skb::new(skb);
    let headers = min(packet.len(), MAX_HEADERS_LEN);
    if packet.linear_len() >= headers {
        return 0;
    }
    // SAFETY: the helper takes the context of a TC program.
    unsafe { bpf_skb_pull_data(skb, headers) }
}

/// Upper bound in bytes of all headers that the parser reads: 256 bytes for Ethernet, VLAN tags, IPv6 and ports, and extension
/// headers of at most 2,048 bytes each (RFC 8200, section 4.3).
#[expect(clippy::cast_possible_truncation, reason = "a small number")]
const MAX_HEADERS_LEN: u32 = 256 + 2048 * MAX_EXTENSION_HEADERS as u32;

/// A packet to a protected endpoint that the node did not send.
pub(crate) struct Classified {
    pub(crate) skb: *mut __sk_buff,
    pub(crate) ip: IpOffset,
    pub(crate) hook: Hook,
    pub(crate) verdict: Verdict,
}

/// Returns the TC action for a packet with this verdict. Packets that are not denied get `TC_ACT_UNSPEC`, which continues with
/// the next program on the hook. `TC_ACT_OK` would skip it.
#[inline(always)]
pub(crate) const fn action(verdict: Verdict) -> i32 {
    match verdict {
        Verdict::Denied => TC_ACT_SHOT,
        Verdict::Unrelated
        | Verdict::Audited
        | Verdict::Off
        | Verdict::Allowed
        | Verdict::Exempt
        | Verdict::Redirected => TC_ACT_UNSPEC,
    }
}

/// Emits an event and sends a reply, within the rate limits of the source. Returns the TC action.
#[inline(always)]
pub(crate) fn finish(
    classified: &Classified,
    limiter: Option<*mut RateLimiter>,
    direction: ReplyDirection,
) -> i32 {
    let &Classified { skb, ip, hook, verdict } = classified;
    let Some(limiter) = limiter else {
        diagnostics::warn_map_full(hook as u32);
        return action(verdict);
    };
    // SAFETY: the rate limiter belongs to this CPU, and the map does not free it while the program that looked it up runs.
    let limiter = unsafe { &mut *limiter };
    events::report_packet(skb, ip, hook, verdict, limiter);
    let action = action(verdict);
    let may_reply = action == TC_ACT_SHOT && maps::replies_to_denied() && limiter.allow_reply();
    if may_reply { reject::send_reply(skb, ip, direction) } else { action }
}
