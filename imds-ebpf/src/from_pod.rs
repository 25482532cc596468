//! `from_pod` hook: gives a verdict on packets that the pod behind an interface sends or forwards.

use aya_ebpf::bindings::{__sk_buff, TC_ACT_UNSPEC};
use imds_ebpf_common::{Examined, Hook, Place, Subject, SubjectKind, examine};

use crate::{
    edge::{Edge, Judged, conclude, conclude_probe},
    exempt, maps,
    packet::Skb,
    probe,
    reject::Way,
};

/// Hook at TC ingress of the host-side interface of a pod.
pub(crate) struct FromPod;

impl Edge for FromPod {
    #[inline(never)]
    fn judge_header(skb: *mut __sk_buff, place: Place) -> i32 {
        let (packet, hook) = (Skb::new(skb), Hook::FromPod);
        let Some(Examined { destination, verdict }) = examine(&packet, place, &maps::Maps) else {
            return TC_ACT_UNSPEC;
        };
        let pod = Subject::new(SubjectKind::Interface, packet.ifindex().into());
        if let Some(probed) = probe::judge(pod, hook, verdict) {
            exempt::set_mark(skb, u32::from(probed.is_marked));
            return conclude_probe(probed.verdict);
        }
        let verdict = exempt::at_from_pod(skb, place, verdict, &destination);
        let counter = maps::count(packet.ifindex(), hook, verdict, packet.len());
        // At this hook each interface is one source, so its counter also contains the rate limiter.
        // SAFETY: the map owns the counter, and does not free it while the program that looked it up runs.
        let window = counter.map(|counter| unsafe { &raw mut (*counter).window });
        conclude(&Judged { skb, place, hook, verdict }, window, Way::Out)
    }
}
