//! `node_egress` hook: gives a verdict on packets that the node forwards for pods, and lets the node's own packets pass.

use aya_ebpf::bindings::{__sk_buff, TC_ACT_UNSPEC};
use imds_ebpf_common::{
    EndpointMatch, Hook, IpOffset, Subject, SubjectKind, Verdict, event::RateLimitKey, lookup_endpoint,
};

use crate::{
    events, exempt, maps,
    packet::Skb,
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
        let Some(sender) = sender::identify(skb, ip) else { return pass_marked(skb) };
        if let Some(probed) = classify_probe(&packet, sender, verdict) {
            exempt::set_mark(skb, 1);
            return action(probed.verdict);
        }
        let verdict = exempt::apply_at_node_egress(skb, ip, sender, verdict, &destination);
        exempt::set_mark(skb, 1);
        let _uncounted = maps::count(packet.ifindex(), hook, verdict, packet.len());
        let limiter =
            events::rate_limiter(&RateLimitKey::new(packet.ingress_ifindex().into(), hook, verdict));
        finish(&Classified { skb, ip, hook, verdict }, limiter, ReplyDirection::Ingress)
    }
}

/// Sets the mark on a packet of the node, so that the next `node_egress` hook on its path lets it pass. Returns the TC action.
#[inline(never)]
fn pass_marked(skb: *mut __sk_buff) -> i32 {
    exempt::set_mark(skb, 1);
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
fn classify_probe(packet: &Skb, sender: SocketOwner, verdict: Verdict) -> Option<Probed> {
    if !maps::has_probes() {
        return None;
    }
    let probe = maps::probe(&subject(sender.cookie, packet.ingress_ifindex()))?;
    if probe::is_bridge(probe) && packet.mark() & maps::mark_bit() == 0 {
        return None;
    }
    Some(probe::count(probe, Hook::NodeEgress, verdict))
}
