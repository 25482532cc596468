//! Code shared by the `cgroup_skb` programs: the fast path, the search for the endpoint, and the report of a verdict.

use aya_ebpf::{bindings::__sk_buff, programs::SkBuffContext};
use imds_ebpf_common::{
    CounterKey, EndpointMatch, Hook, IpOffset, LinkLayer, Verdict, event::RateLimitKey, find_header,
    is_unrelated_fast, lookup_endpoint,
};

use crate::{diagnostics, events, maps, packet::Skb};

/// Returns the verdict on a packet. `classify_slow` returns its number, from a separate function as at
/// [`tc_hook::classify`](crate::tc_hook::classify).
#[inline(always)]
pub(crate) fn classify(ctx: &SkBuffContext, classify_slow: impl FnOnce(*mut __sk_buff) -> u32) -> Verdict {
    let skb = ctx.skb.skb;
    if is_unrelated_fast(&Skb::new(skb), LinkLayer::None, &maps::Maps) {
        return Verdict::Unrelated;
    }
    Verdict::from_u32(classify_slow(skb))
}

/// Returns the position of the IP header and the protected endpoint that the packet goes to, if there is one.
#[inline(always)]
pub(crate) fn find_endpoint(packet: &Skb) -> Option<(IpOffset, EndpointMatch)> {
    let ip = find_header(packet, LinkLayer::None).ok()?.hide_bounds(packet);
    Some((ip, lookup_endpoint(packet, ip, &maps::Maps)?))
}

/// Counts a packet and emits its event. `source` is the [`RateLimitKey::id`]. Returns the number of the verdict.
#[inline(always)]
pub(crate) fn report(skb: *mut __sk_buff, ip: IpOffset, source: u64, hook: Hook, verdict: Verdict) -> u32 {
    let _uncounted = maps::count(CounterKey::DELETED, hook, verdict, Skb::new(skb).len());
    match events::rate_limiter(&RateLimitKey::new(source, hook, verdict)) {
        // SAFETY: the rate limiter belongs to this CPU, and the map does not free it while the program that looked it up runs.
        Some(limiter) => events::report_packet(skb, ip, hook, verdict, unsafe { &mut *limiter }),
        None => diagnostics::warn_map_full(hook as u32),
    }
    verdict as u32
}
