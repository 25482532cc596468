//! Senders that are exempt.

use aya_ebpf::bindings::__sk_buff;
use imds_ebpf_common::{
    Address, Hook, Packet as _, Subject, SubjectKind, Tables as _, Verdict, exemption::soften_thoroughly,
};

use crate::{
    maps::{self, Maps},
    packet::Skb,
};

/// The verdict on what `subject` sends to `address`, where it is `verdict` on anybody else.
#[inline(always)]
pub(crate) fn of(verdict: Verdict, subject: Subject, address: &Address) -> Verdict {
    if !Maps.may_be_exempt(subject.slot()) {
        return verdict;
    }
    let softened = granted(subject.id, subject.kind, address, verdict as u32);
    // SAFETY: it is one's.
    unsafe { Verdict::from_u32_unchecked(softened) }
}

/// The same of a packet at `from_pod`, where what is exempt is marked for `node_egress`.
#[inline(always)]
pub(crate) fn at_from_pod(skb: *mut __sk_buff, verdict: Verdict, address: &Address) -> Verdict {
    let packet = Skb::new(skb);
    let softened = of(verdict, Subject::new(SubjectKind::Interface, packet.ifindex().into()), address);
    if softened != verdict {
        packet.set_mark(packet.mark() | maps::mark());
    }
    softened.without_origin(&packet)
}

/// The same at `node_egress`, of a packet that `sender` sent.
///
/// Of what came in by an interface the mark says it: the kernel takes it off a packet that comes from another network
/// namespace by a pair of links, so that `from_pod` gave it. The interface itself could be another pod's by now. A pod's
/// own mark stays on what it sends by macvlan, which comes in by none.
#[inline(always)]
pub(crate) fn at_node_egress(
    skb: *mut __sk_buff,
    sender: Subject,
    verdict: Verdict,
    address: &Address,
) -> Verdict {
    let packet = Skb::new(skb);
    // The verifier then follows what comes next once, and not once for each kind of sender.
    #[expect(clippy::cast_possible_truncation, reason = "BPF has words of 64 bits")]
    let number = |number: u64| packet.forget_origin(number as usize) as u64;
    let softened = look_at_node_egress(skb, number(sender.id), number(sender.kind), address, verdict as u32);
    // SAFETY: it is one's.
    unsafe { Verdict::from_u32_unchecked(softened) }.without_origin(&packet)
}

/// Takes and returns the number of a verdict.
#[inline(never)]
fn look_at_node_egress(skb: *mut __sk_buff, id: u64, kind: u64, address: &Address, verdict: u32) -> u32 {
    let packet = Skb::new(skb);
    if packet.ingress_ifindex() != 0 && maps::is_on(Hook::FromPod) {
        let (mark, bit) = (packet.mark(), maps::mark());
        if mark & bit == 0 {
            return verdict;
        }
        packet.set_mark(mark & !bit);
        return Verdict::Exempt as u32;
    }
    // SAFETY: it is one's.
    let verdict = unsafe { Verdict::from_u32_unchecked(verdict) };
    of(verdict, Subject { id, kind }, address) as u32
}

/// A function of its own: few packets come here. Takes and returns the number of a verdict.
#[inline(never)]
fn granted(id: u64, kind: u64, address: &Address, verdict: u32) -> u32 {
    // SAFETY: it is one's.
    let verdict = unsafe { Verdict::from_u32_unchecked(verdict) };
    soften_thoroughly(verdict, Subject { id, kind }, address, &Maps) as u32
}
