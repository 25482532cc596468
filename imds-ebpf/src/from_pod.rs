//! The `from_pod` hook: every packet here was sent, or forwarded, by the pod behind the interface.

use aya_ebpf::bindings::{__sk_buff, TC_ACT_UNSPEC};
use imds_ebpf_common::{Examined, Hook, Place, Subject, SubjectKind, examine};

use crate::{
    edge::{Edge, Judged, conclude, conclude_probe},
    exempt, maps,
    packet::Skb,
    probe,
    reject::Way,
};

/// The hook at ingress of the host side of a pod link.
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
        // One interface is one source here, so that its counter contains the rate limit too.
        // SAFETY: the map owns the counter, and nothing frees it under a running program.
        let window = counter.map(|counter| unsafe { &raw mut (*counter).window });
        conclude(&Judged { skb, place, hook, verdict }, window, Way::Out)
    }
}
