//! Code shared by the two TC hooks: finds the IP header, and reports and answers packets to protected endpoints.

use aya_ebpf::{
    bindings::{__sk_buff, TC_ACT_SHOT, TC_ACT_UNSPEC},
    programs::TcContext,
};
use imds_ebpf_common::{
    DenyAction, Frame, Hook, Place, Verdict, event::Window, find_header, is_plainly_foreign,
};

use crate::{
    diagnostics, events, maps,
    packet::Skb,
    reject::{self, Way},
};

/// TC hook that gives a verdict on packets.
pub(crate) trait Edge {
    /// Gives a verdict on a packet with an IP header at `place` that may go to a protected endpoint. Returns the TC action.
    ///
    /// Implementations are separate functions, so that the verifier checks them once for all positions of the header.
    fn judge_header(skb: *mut __sk_buff, place: Place) -> i32;
}

/// Gives a verdict on a packet at the hook `E`. Returns the TC action.
///
/// The slow path is in separate functions: inlined, its registers and stack would cost every packet some instructions.
#[inline(always)]
pub(crate) fn judge<E: Edge>(ctx: &TcContext, frame: Frame) -> i32 {
    let skb = ctx.skb.skb;
    if is_plainly_foreign(&Skb::new(skb), frame, &maps::Maps) {
        return TC_ACT_UNSPEC;
    }
    match frame {
        Frame::Ethernet => judge_ethernet::<E>(skb),
        Frame::Ip => judge_without_link_layer::<E>(skb),
    }
}

#[inline(never)]
fn judge_ethernet<E: Edge>(skb: *mut __sk_buff) -> i32 {
    judge_frame::<E>(skb, Frame::Ethernet)
}

#[inline(never)]
fn judge_without_link_layer<E: Edge>(skb: *mut __sk_buff) -> i32 {
    judge_frame::<E>(skb, Frame::Ip)
}

#[inline(always)]
fn judge_frame<E: Edge>(skb: *mut __sk_buff, frame: Frame) -> i32 {
    let packet = Skb::new(skb);
    match find_header(&packet, frame) {
        Some(place) => E::judge_header(skb, place.without_origin(&packet)),
        None => TC_ACT_UNSPEC,
    }
}

/// A packet to a protected endpoint that the node did not send.
pub(crate) struct Judged {
    pub(crate) skb: *mut __sk_buff,
    pub(crate) place: Place,
    pub(crate) hook: Hook,
    pub(crate) verdict: Verdict,
}

/// Returns the TC action for a packet of a test sender, which gets no counter, event or reply.
#[inline(always)]
pub(crate) const fn conclude_probe(verdict: Verdict) -> i32 {
    match verdict {
        Verdict::Deny => TC_ACT_SHOT,
        Verdict::Foreign | Verdict::Audit | Verdict::Allow | Verdict::Kept | Verdict::Exempt => TC_ACT_UNSPEC,
    }
}

/// Emits an event and sends a reply, within the rate limits of the source. Returns the TC action.
///
/// Packets that are not denied get `TC_ACT_UNSPEC`, which continues with the next program on the hook. `TC_ACT_OK` would skip
/// it.
#[inline(always)]
pub(crate) fn conclude(judged: &Judged, window: Option<*mut Window>, way: Way) -> i32 {
    let &Judged { skb, place, hook, verdict } = judged;
    // SAFETY: the window belongs to this CPU, and the map does not free it while the program that looked it up runs.
    let mut window = window.map(|window| unsafe { &mut *window });
    match &mut window {
        Some(window) => events::packet(skb, place, hook, verdict, window),
        None => diagnostics::unaccounted(hook as u32),
    }
    match verdict {
        Verdict::Deny => {}
        Verdict::Foreign | Verdict::Audit | Verdict::Allow | Verdict::Kept | Verdict::Exempt => {
            return TC_ACT_UNSPEC;
        }
    }
    let is_answered = maps::on_deny() == DenyAction::Reject && window.is_some_and(Window::may_answer);
    if is_answered { reject::answer(skb, place, way) } else { TC_ACT_SHOT }
}
