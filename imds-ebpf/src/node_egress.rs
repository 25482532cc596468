//! `node_egress` hook: gives a verdict on packets that the node forwards for pods, and lets the node's own packets pass.

use aya_ebpf::bindings::{__sk_buff, TC_ACT_UNSPEC};
use imds_ebpf_common::{Examined, Hook, Place, Subject, SubjectKind, Verdict, event::Source, examine};

use crate::{
    edge::{Edge, Judged, conclude, conclude_probe},
    events, exempt, maps,
    packet::Skb,
    probe::{self, Probed},
    reject::Way,
    sender::{self, Sender},
};

/// Hook at TC egress of the node's interfaces.
pub(crate) struct NodeEgress;

impl Edge for NodeEgress {
    #[inline(never)]
    fn judge_header(skb: *mut __sk_buff, place: Place) -> i32 {
        let (packet, hook) = (Skb::new(skb), Hook::NodeEgress);
        let Some(Examined { destination, verdict }) = examine(&packet, place, &maps::Maps) else {
            return TC_ACT_UNSPEC;
        };
        let Some(sender) = sender::of(skb) else { return pass_marked(skb) };
        if let Some(probed) = judge_probe(&packet, sender, verdict) {
            exempt::set_mark(skb, 1);
            return conclude_probe(probed.verdict);
        }
        let verdict = exempt::at_node_egress(skb, place, sender, verdict, &destination);
        exempt::set_mark(skb, 1);
        let _uncounted = maps::count(packet.ifindex(), hook, verdict, packet.len());
        let window = events::window(&Source { id: u64::from(packet.ingress_ifindex()), hook: hook as u64 });
        conclude(&Judged { skb, place, hook, verdict }, window, Way::In)
    }
}

/// Sets the mark on a packet of the node, so that the next `node_egress` hook on its path lets it pass. Returns the TC action.
#[inline(never)]
fn pass_marked(skb: *mut __sk_buff) -> i32 {
    exempt::set_mark(skb, 1);
    TC_ACT_UNSPEC
}

/// Counts a packet if its sender is a test sender, and returns the verdict. Identifies the sender like any other.
#[inline(always)]
fn judge_probe(packet: &Skb, sender: Sender, verdict: Verdict) -> Option<Probed> {
    if !maps::has_probes() {
        return None;
    }
    let ifindex = u64::from(packet.ingress_ifindex());
    let find = |kind, id| maps::probe(&Subject::new(kind, id));
    let probe = find(SubjectKind::Netns, sender.cookie)
        .or_else(|| find(SubjectKind::Interface, ifindex))
        .or_else(|| find(SubjectKind::Bridge, ifindex).filter(|_| packet.mark() & maps::mark() != 0))?;
    Some(probe::count(probe, Hook::NodeEgress, verdict))
}
