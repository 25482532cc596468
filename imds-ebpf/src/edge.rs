//! What both edges do alike: judge, count, tell and answer.

use aya_ebpf::bindings::{__sk_buff, TC_ACT_SHOT, TC_ACT_UNSPEC};
use imds_ebpf_common::{Answer, Frame, Hook, Place, Verdict, event::Window};

use crate::{
    diagnostics, events, maps,
    reject::{self, Way},
};

/// A packet to a guarded endpoint that the node did not send.
pub(crate) struct Judged {
    pub(crate) skb: *mut __sk_buff,
    pub(crate) frame: Frame,
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

/// Tells of the packet and answers it, as far as its source may still cause that. Returns the TC action.
///
/// `TC_ACT_UNSPEC` for all that is not denied: it leaves the packet to the other programs on the hook, which `TC_ACT_OK`
/// would skip.
#[inline(always)]
pub(crate) fn conclude(judged: &Judged, window: Option<*mut Window>, way: Way) -> i32 {
    let &Judged { skb, frame, place, hook, verdict } = judged;
    // SAFETY: this CPU's own, and its map keeps it as long as a program runs that found it.
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
    let is_answered = maps::answer() == Answer::Reject && window.is_some_and(Window::may_answer);
    if is_answered { reject::answer(skb, frame, place, way) } else { TC_ACT_SHOT }
}
