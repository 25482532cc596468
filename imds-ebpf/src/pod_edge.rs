//! The pod edge: all that arrives here was sent by a pod.

use aya_ebpf::programs::TcContext;
use imds_ebpf_common::{Frame, Hook, Verdict};

use crate::{maps, packet::Skb};

#[inline(always)]
pub(crate) fn judge(ctx: &TcContext, frame: Frame) -> Verdict {
    let skb = Skb::new(ctx);
    let verdict = imds_ebpf_common::judge(&skb, frame, &maps::Maps);
    match verdict {
        Verdict::Foreign => {}
        Verdict::Deny | Verdict::Audit | Verdict::Allow | Verdict::Kept => {
            maps::count(skb.ifindex(), Hook::PodEdge, verdict, skb.len());
        }
    }
    verdict
}
