//! `from_pod` hook: gives a verdict on packets that the pod behind an interface sends or forwards.

use aya_ebpf::bindings::{__sk_buff, TC_ACT_UNSPEC};
use imds_ebpf_common::{EndpointMatch, Hook, IpOffset, Subject, SubjectKind, lookup_endpoint};

use crate::{
    exempt, maps,
    packet::{ReceivedSkb, Skb},
    passed::set_passed,
    probe,
    reject::ReplyDirection,
    requests,
    tc_hook::{Classified, TcProgram, action, finish},
};

/// Hook at TC ingress of the host-side interface of a pod.
pub(crate) struct FromPod;

impl TcProgram for FromPod {
    type Packet = ReceivedSkb;

    #[inline(always)]
    fn packet(skb: *mut __sk_buff) -> ReceivedSkb {
        ReceivedSkb::new(skb)
    }

    #[inline(never)]
    fn classify_header(skb: *mut __sk_buff, ip: IpOffset) -> i32 {
        let (packet, hook) = (Skb::new(skb), Hook::FromPod);
        let Some(EndpointMatch { destination, verdict }) = lookup_endpoint(&packet, ip, &maps::Maps) else {
            return TC_ACT_UNSPEC;
        };
        let pod = Subject::new(SubjectKind::Interface, packet.ifindex().into());
        if let Some(probed) = probe::classify(pod, hook, verdict) {
            set_passed(skb, u32::from(probed.passes));
            return action(probed.verdict);
        }
        let verdict = exempt::apply_at_from_pod(skb, ip, verdict, &destination);
        let counter = maps::count(packet.ifindex(), hook, verdict, packet.len());
        // At this hook each interface is one source, so its counter also contains the rate limiter.
        // SAFETY: the map owns the counter, and does not free it while the program that looked it up runs.
        let limiter = counter.map(|counter| unsafe { &raw mut (*counter).limiter });
        let classified = Classified { skb, ip, hook, verdict };
        let action = finish(&classified, limiter, ReplyDirection::Egress);
        requests::report(&classified, &destination, limiter);
        action
    }
}
