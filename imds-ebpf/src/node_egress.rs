//! `node_egress` hook: gives a verdict on packets that the node forwards for pods, and lets the node's own packets pass.

use core::ptr;

use aya_ebpf::bindings::{__sk_buff, TC_ACT_UNSPEC};
use imds_ebpf_common::{
    EndpointMatch, Hook, IpOffset, ProbeRecord, Subject, SubjectKind, Verdict, event::RateLimitKey,
    lookup_endpoint,
};

use crate::{
    events, exempt, maps,
    packet::Skb,
    passed::{is_passed, set_passed},
    probe::{self, Probed},
    reject::ReplyDirection,
    sender::{self, SocketOwner},
    tc_hook::{Classified, TcProgram, action, finish},
};

/// Hook at TC egress of the node's interfaces.
pub(crate) struct NodeEgress;

impl TcProgram for NodeEgress {
    type Packet = Skb;

    #[inline(always)]
    fn packet(skb: *mut __sk_buff) -> Skb {
        Skb::new(skb)
    }

    #[inline(never)]
    fn classify_header(skb: *mut __sk_buff, ip: IpOffset) -> i32 {
        let (packet, hook) = (Skb::new(skb), Hook::NodeEgress);
        let Some(EndpointMatch { destination, verdict }) = lookup_endpoint(&packet, ip, &maps::Maps) else {
            return TC_ACT_UNSPEC;
        };
        let Some(sender) = sender::identify(skb, ip) else { return pass_own(skb) };
        if let Some(probed) = classify_probe(skb, sender, verdict) {
            set_passed(skb, 1);
            return action(probed.verdict);
        }
        let verdict = exempt::apply_at_node_egress(skb, ip, sender, verdict, &destination);
        set_passed(skb, 1);
        let _uncounted = maps::count(packet.ifindex(), hook, verdict, packet.len());
        let limiter =
            events::rate_limiter(&RateLimitKey::new(packet.ingress_ifindex().into(), hook, verdict));
        finish(&Classified { skb, ip, hook, verdict }, limiter, ReplyDirection::Ingress)
    }
}

/// Lets a packet of the node pass at this and the next `node_egress` hooks on its path. Returns the TC action.
#[inline(never)]
fn pass_own(skb: *mut __sk_buff) -> i32 {
    set_passed(skb, 1);
    TC_ACT_UNSPEC
}

/// Returns the network namespace with this cookie, or the interface if the cookie is 0. Without branches, so that the verifier
/// follows one path.
#[inline(always)]
fn subject(cookie: u64, ifindex: u32) -> Subject {
    let has_cookie = (cookie | cookie.wrapping_neg()) >> 63;
    let [interface, netns] = [SubjectKind::Interface as u64, SubjectKind::Netns as u64];
    Subject {
        id: cookie | (u64::from(ifindex) & has_cookie.wrapping_sub(1)),
        kind: interface + has_cookie * (netns - interface),
    }
}

/// Counts a packet if its sender is a test sender, and returns the verdict. Identifies the sender like any other.
#[inline(always)]
fn classify_probe(skb: *mut __sk_buff, sender: SocketOwner, verdict: Verdict) -> Option<Probed> {
    let probe = find_probe(skb, sender.cookie);
    if probe.is_null() {
        return None;
    }
    Some(probe::count(probe, Hook::NodeEgress, verdict))
}

/// Returns the test sender of the packet, or a null pointer. A separate function, because map keys that stay on the caller's stack
/// make the verifier follow the rest of the caller again.
#[inline(never)]
fn find_probe(skb: *mut __sk_buff, cookie: u64) -> *mut ProbeRecord {
    if !maps::has_probes() {
        return ptr::null_mut();
    }
    let is_sender = |probe: &*mut ProbeRecord| !probe::is_bridge(*probe) || is_passed(skb);
    let probe = maps::probe(&subject(cookie, Skb::new(skb).ingress_ifindex()));
    probe.filter(is_sender).unwrap_or(ptr::null_mut())
}
