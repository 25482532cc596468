//! Common parts of the two TC hooks: find the IP header, judge, count, report and answer.

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

/// A hook of TC.
pub(crate) trait Edge {
    /// Judges a packet that may go to a protected endpoint, by the IP header at `place`. Returns the TC action.
    ///
    /// Implementations are separate functions, which the verifier follows once for all places of the header.
    fn judge_header(skb: *mut __sk_buff, place: Place) -> i32;
}

/// Judges a packet at the hook `E`. Returns the TC action.
///
/// The rest is in separate functions, because registers and stack of those would cost every packet some instructions.
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

/// Returns the TC action for a packet of a test sender: neither counted with others nor reported nor answered.
#[inline(always)]
pub(crate) const fn conclude_probe(verdict: Verdict) -> i32 {
    match verdict {
        Verdict::Deny => TC_ACT_SHOT,
        Verdict::Foreign | Verdict::Audit | Verdict::Allow | Verdict::Kept | Verdict::Exempt => TC_ACT_UNSPEC,
    }
}

/// Reports the packet and answers it, within the limits of its source. Returns the TC action.
///
/// `TC_ACT_UNSPEC` for all that is not denied: it leaves the packet to the other programs on the hook, which `TC_ACT_OK`
/// would skip.
#[inline(always)]
pub(crate) fn conclude(judged: &Judged, window: Option<*mut Window>, way: Way) -> i32 {
    let &Judged { skb, place, hook, verdict } = judged;
    // SAFETY: the window belongs to this CPU, and its map keeps it as long as a program runs that found it.
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
