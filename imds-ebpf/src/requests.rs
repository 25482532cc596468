//! Copies the start of HTTP requests that exempt and audited pods send, so that the operator learns which requests they need.

use core::{cmp::min, ptr::addr_of_mut};

use aya_ebpf::{
    bindings::__sk_buff, btf_maps::RingBuf, helpers::generated::bpf_skb_load_bytes, macros::btf_map,
};
use imds_ebpf_common::{
    Address, IpOffset, Packet as _, RequestStart, Verdict,
    event::RateLimiter,
    opaque::opaque,
    request::{MAX_TEXT, MIN_TEXT, RequestHeader, is_request, tcp_payload},
};

use crate::{events::now, packet::Skb, tc_hook::Classified};

/// Size of the ring buffer in bytes: about 340 requests. A full buffer keeps the oldest requests until an agent reads them.
const RING_BYTES: usize = 64 * 1024;

/// Ring buffer of [`RequestStart`]s. The definition omits the value type, because libbpf rejects ring buffers that have one.
#[btf_map(name = "imds_req_starts")]
static STARTS: RingBuf<(), RING_BYTES> = RingBuf::new();

/// Emits the start of a request to `endpoint` that passes, unless the source has reached its limit. Call it after the event of the
/// packet.
#[inline(always)]
pub(crate) fn report(classified: &Classified, endpoint: &Address, limiter: Option<*mut RateLimiter>) {
    let &Classified { skb, ip, hook, verdict } = classified;
    match verdict {
        Verdict::Exempt | Verdict::Audited => {}
        Verdict::Unrelated | Verdict::Denied | Verdict::Off | Verdict::Allowed | Verdict::Redirected => {
            return;
        }
    }
    if let Some(limiter) = limiter {
        // SAFETY: the rate limiter belongs to this CPU, and the map does not free it while the program that looked it up runs.
        emit(skb, ip, endpoint, hook as u32 | (verdict as u32) << 8, unsafe { &mut *limiter });
    }
}

/// Emits the packet if it is the start of a request. A separate function, so that the verifier checks it once for all positions
/// of the header.
#[inline(never)]
#[expect(
    clippy::cast_possible_truncation,
    reason = "only the lower bits are needed: lengths and offsets have 32, hook and verdict 8"
)]
fn emit(skb: *mut __sk_buff, ip: IpOffset, endpoint: &Address, classified: u32, limiter: &mut RateLimiter) {
    let packet = Skb::new(skb);
    let Some((port, payload)) = tcp_payload(&packet, ip) else { return };
    let available = (packet.len() as usize).wrapping_sub(payload);
    if available < MIN_TEXT || !packet.fetch(payload).is_some_and(is_request) || !limiter.allow_request() {
        return;
    }
    let Some(mut entry) = STARTS.reserve_untyped::<RequestStart>(0) else { return };
    // From 1 to `MAX_TEXT` bytes, in a form whose bounds the verifier sees.
    let length = (opaque((min(available, MAX_TEXT) - 1) as u64) as u32 & (MAX_TEXT as u32 - 1)) + 1;
    let start = entry.as_mut_ptr();
    // SAFETY: the pointer is to reserved memory of this size.
    let text = unsafe { addr_of_mut!((*start).text) };
    // SAFETY: the text has at least `length` bytes. The helper checks the range against the packet.
    let failed = unsafe { bpf_skb_load_bytes(skb.cast(), payload as u32, text.cast(), length) };
    if failed != 0 {
        entry.discard(0);
        return;
    }
    let properties = RequestHeader {
        time: now(),
        endpoint: *endpoint,
        ifindex: packet.ifindex(),
        length,
        port,
        hook: classified as u8,
        verdict: (classified >> 8) as u8,
        reserved: 0,
    };
    // SAFETY: the pointer is to reserved memory of this size.
    let header = unsafe { addr_of_mut!((*start).header) };
    // SAFETY: the pointer is to reserved memory of this size.
    unsafe { header.write(properties) };
    entry.submit(0);
}
