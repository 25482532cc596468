//! Exemptions: looks up the exemption that changes the verdict on a packet or call.
//!
//! The programs identify senders by values that pods and firewall rules can't write: the netns cookie of the socket and the ingress
//! interface. Pods behind a bridge of the node need the hash of the packet in addition, because the ingress interface of their packets
//! at `node_egress` is the bridge ([`crate::passed`]).

use aya_ebpf::bindings::__sk_buff;
use imds_ebpf_common::{
    Address, ExemptionKey, ExemptionRecord, Hook, InterfaceRecord, IpOffset, Packet as _, PolicyLookup as _,
    Subject, SubjectKind, TcHook, Verdict,
    exemption::{NODE_SOURCES, find_exemption},
    opaque::opaque,
    packet::source,
};

use crate::{
    maps::{self, Maps},
    netns::{self, SocketNetns},
    packet::Skb,
    passed::{is_passed, set_passed},
    sender::SocketOwner,
};

/// Returns the verdict on a request of `subject` to `address`. `verdict` is the verdict without exemptions.
#[inline(always)]
pub(crate) fn apply(verdict: Verdict, subject: Subject, address: &Address) -> Verdict {
    if !Maps.may_be_exempt(subject.slot()) {
        return verdict;
    }
    let (exempted, _) = unpack(find_exemption_packed(subject.id, subject.kind, address, verdict as u32));
    exempted
}

/// Applies exemptions at `from_pod`, where the interface identifies the pod.
///
/// An exemption covers packets of the pod's sockets and packets from its addresses, but not traffic that the pod forwards
/// for other senders. Sets the hash of passed packets for pods behind a bridge, and no other packet to a protected endpoint
/// keeps it.
#[inline(always)]
pub(crate) fn apply_at_from_pod(
    skb: *mut __sk_buff,
    ip: IpOffset,
    verdict: Verdict,
    address: &Address,
) -> Verdict {
    let exempted = exempt_at_from_pod(skb, ip, address, verdict as u32);
    // SAFETY: the called function returns the number of a verdict.
    unsafe { Verdict::from_u32_unchecked(exempted) }.hide_bounds(&Skb::new(skb))
}

/// Takes and returns the number of a verdict. A separate function, so that the verifier checks it apart from its callers.
#[inline(never)]
fn exempt_at_from_pod(skb: *mut __sk_buff, ip: IpOffset, address: &Address, verdict: u32) -> u32 {
    // SAFETY: the caller passes the number of a verdict.
    let verdict = unsafe { Verdict::from_u32_unchecked(verdict) };
    let packet = Skb::new(skb);
    let ifindex = packet.ifindex();
    let subject = Subject::new(SubjectKind::Interface, ifindex.into());
    let (mut exempted, mut passes) = (verdict, false);
    if Maps.may_be_exempt(subject.slot()) {
        let (found, flags) = unpack(find_exemption_packed(subject.id, subject.kind, address, verdict as u32));
        let is_changed = found as u32 != verdict as u32 && flags & ExemptionRecord::BRIDGE == 0;
        if is_changed && is_own_packet(skb, ip, ifindex, address) {
            (exempted, passes) = (found, flags & ExemptionRecord::PASSES != 0);
            maps::record_exempt_use(ifindex);
        }
    }
    set_passed(skb, u32::from(passes));
    exempted as u32
}

/// Applies exemptions at `node_egress`. Uses the most reliable identity first: the network namespace of the socket, then the
/// ingress interface, then the hash of packets from a bridge with an exempt pod as port.
#[inline(always)]
pub(crate) fn apply_at_node_egress(
    skb: *mut __sk_buff,
    ip: IpOffset,
    sender: SocketOwner,
    verdict: Verdict,
    address: &Address,
) -> Verdict {
    let exempted = exempt_at_node_egress(skb, ip, sender.cookie, address, verdict as u32);
    // SAFETY: the called function returns the number of a verdict.
    unsafe { Verdict::from_u32_unchecked(exempted) }.hide_bounds(&Skb::new(skb))
}

/// Takes and returns the number of a verdict. A separate function, because only packets to protected endpoints need it.
#[inline(never)]
fn exempt_at_node_egress(
    skb: *mut __sk_buff,
    ip: IpOffset,
    cookie: u64,
    address: &Address,
    verdict: u32,
) -> u32 {
    // SAFETY: the caller passes the number of a verdict.
    let verdict = unsafe { Verdict::from_u32_unchecked(verdict) };
    if netns::is_known_at_tc() && cookie != 0 {
        let exempted = apply(verdict, Subject::new(SubjectKind::Netns, cookie), address);
        if exempted as u32 != verdict as u32 {
            return exempted as u32;
        }
    }
    apply_by_interface(skb, ip, Skb::new(skb).ingress_ifindex(), verdict, address) as u32
}

/// Applies the exemption of the ingress interface `ifindex`. For a bridge, only if `from_pod` has let the packet pass.
#[inline(always)]
pub(crate) fn apply_by_interface(
    skb: *mut __sk_buff,
    ip: IpOffset,
    ifindex: u32,
    verdict: Verdict,
    address: &Address,
) -> Verdict {
    let subject = Subject::new(SubjectKind::Interface, ifindex.into());
    if !Maps.may_be_exempt(subject.slot()) {
        return verdict;
    }
    let (exempted, flags) = unpack(find_exemption_packed(subject.id, subject.kind, address, verdict as u32));
    let packet = Skb::new(skb);
    let is_bridge = flags & ExemptionRecord::BRIDGE != 0;
    if exempted as u32 == verdict as u32 || (is_bridge && !is_passed(skb)) {
        return verdict;
    }
    // Hidden from the verifier, which otherwise follows the function for each value.
    let is_bridge = packet.verifier_opaque(is_bridge.into());
    if is_source_checked(skb, ip, ifindex, is_bridge) { exempted } else { verdict }
}

/// Reports whether a packet at `from_pod` belongs to the exempt pod itself and is not forwarded for another sender.
///
/// A forwarded packet has no socket (`ip_rcv_core` and `ip6_rcv_core` orphan it).
#[inline(always)]
fn is_own_packet(skb: *mut __sk_buff, ip: IpOffset, ifindex: u32, address: &Address) -> bool {
    let is_from_exempt_socket = match netns::from_socket(skb) {
        SocketNetns::Cookie(cookie) => is_exempt_netns(cookie, address),
        SocketNetns::Unknown => true,
        SocketNetns::NoSocket => false,
    };
    is_from_exempt_socket || has_source(skb, ip, ifindex, ifindex)
}

/// Reports whether the network namespace with this cookie is exempt for the endpoint or for all endpoints.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "the value is zero")]
fn is_exempt_netns(cookie: u64, address: &Address) -> bool {
    let subject = Subject::new(SubjectKind::Netns, cookie);
    // `Address::ANY`, hidden from the compiler, which would put the constant in an additional section.
    let any = Address::from_ipv4((opaque(0) as u32).to_be_bytes());
    maps::has_exemption(&ExemptionKey { address: any, subject })
        || maps::has_exemption(&ExemptionKey { address: *address, subject })
}

/// Reports whether a packet from the interface of an exempt pod, or a passed packet from a bridge with an exempt pod, is the
/// pod's own. A separate function, so that the verifier checks it once.
///
/// The source must be the pod's, or the node's after source NAT. If `from_pod` is attached to the pod's interface by a link, that
/// hook compares the source before source NAT, and the node's addresses count only while it lets packets of the pod pass. There
/// is no recent use if another pod's interface has got the same index while no agent runs, or if `from_pod` saw only the address
/// of a Service. Behind a bridge, the source counts in addition to the hash, because other programs of the node can set the hash.
#[inline(never)]
#[expect(clippy::cast_possible_truncation, reason = "the value has 32 bits")]
fn is_source_checked(skb: *mut __sk_buff, ip: IpOffset, ifindex: u32, is_bridge: usize) -> bool {
    let is_source_nat_excluded =
        is_bridge == 0 && has_from_pod_link(ifindex) && !maps::is_exempt_use_recent(ifindex);
    let other = if is_source_nat_excluded { ifindex } else { NODE_SOURCES };
    // Hidden from the verifier, which otherwise follows the function for each value.
    let other = Skb::new(skb).verifier_opaque(other as usize) as u32;
    has_source(skb, ip, ifindex, other)
}

/// Reports whether `from_pod` is on and attached to the interface by a link. A filter may come after one of another program that
/// redirects the packet, as the CNI plugin `bandwidth` does.
#[inline(always)]
fn has_from_pod_link(ifindex: u32) -> bool {
    let has_link = |record: &InterfaceRecord| record.has_link(TcHook::FromPod);
    maps::is_enabled(Hook::FromPod) && maps::interface(ifindex).is_some_and(has_link)
}

/// Reports whether the packet's source address is registered for one of two interfaces. A separate function, so that the
/// verifier checks it once.
#[inline(never)]
fn has_source(skb: *mut __sk_buff, ip: IpOffset, ifindex: u32, other: u32) -> bool {
    let Some(address) = source(&Skb::new(skb), ip) else { return false };
    is_registered(address, ifindex) || is_registered(address, other)
}

/// Reports whether the packet's source address is registered for the interface.
#[inline(always)]
pub(crate) fn is_source_of(skb: *mut __sk_buff, ip: IpOffset, ifindex: u32) -> bool {
    source(&Skb::new(skb), ip).is_some_and(|address| is_registered(address, ifindex))
}

#[inline(always)]
fn is_registered(address: Address, ifindex: u32) -> bool {
    let subject = Subject::new(SubjectKind::Interface, ifindex.into());
    maps::is_exempt_source(&ExemptionKey { address, subject })
}

/// Looks up the exemption of a subject. Takes the number of a verdict. Returns the number of the verdict with the exemption
/// applied, and the flags of the exemption in the bits above. A separate function, because few packets need it.
#[inline(never)]
fn find_exemption_packed(id: u64, kind: u64, address: &Address, verdict: u32) -> u32 {
    // SAFETY: the caller passes the number of a verdict.
    let verdict = unsafe { Verdict::from_u32_unchecked(verdict) };
    match find_exemption(verdict, Subject { id, kind }, address, &Maps) {
        Some(exemption) => exemption.apply(verdict) as u32 | exemption.flags << FLAGS,
        None => verdict as u32,
    }
}

/// Offset in bits of the flags in the result of [`find_exemption_packed`]; the verdict is below.
const FLAGS: u32 = 8;

/// Splits the result of [`find_exemption_packed`] into verdict and flags.
#[inline(always)]
fn unpack(packed: u32) -> (Verdict, u32) {
    // SAFETY: the lower bits are the number of a verdict.
    (unsafe { Verdict::from_u32_unchecked(packed & ((1 << FLAGS) - 1)) }, packed >> FLAGS)
}
