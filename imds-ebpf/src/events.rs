//! Emits events of packets and calls to protected endpoints. Limits the rate per source, and counts the suppressed events.

use core::ptr;

use aya_ebpf::{
    bindings::{__sk_buff, BPF_ANY},
    btf_maps::{LruPerCpuHashMap, RingBuf},
    helpers::generated::{
        bpf_get_current_cgroup_id, bpf_get_current_comm, bpf_get_current_pid_tgid, bpf_jiffies64,
        bpf_ktime_get_boot_ns, bpf_skb_cgroup_id,
    },
    macros::btf_map,
};
use imds_ebpf_common::{
    Event, Flow, Hook, IpOffset, Verdict,
    event::{MAX_RATE_LIMITERS, RateLimitKey, RateLimiter},
    flow,
    opaque::opaque,
};

use crate::{
    netns::{self, SocketNetns},
    packet::Skb,
};

/// Size of the ring buffer in bytes: about 2,200 events. Without a reader, the oldest events stay for the next one.
const RING_BYTES: usize = 256 * 1024;
/// Size of a thread's name in bytes (`TASK_COMM_LEN`, include/linux/sched.h).
const COMM_LEN: u32 = 16;

/// Ring buffer of [`Event`]s. The definition omits the value type, because libbpf rejects ring buffers that have one.
#[btf_map(name = "imds_events")]
static EVENTS: RingBuf<(), RING_BYTES> = RingBuf::new();

/// Rate limiters of sources. Per CPU, so that no two CPUs write the same value.
#[btf_map(name = "imds_ratelimit")]
static RATE_LIMITERS: LruPerCpuHashMap<RateLimitKey, RateLimiter, MAX_RATE_LIMITERS> =
    LruPerCpuHashMap::new();

/// Emits the event of a packet, unless the source has reached its limit.
#[inline(always)]
pub(crate) fn report_packet(
    skb: *mut __sk_buff,
    ip: IpOffset,
    hook: Hook,
    verdict: Verdict,
    limiter: &mut RateLimiter,
) {
    if !may_emit(limiter, Skb::new(skb).len()) {
        return;
    }
    let classified = hook as u32 | (verdict as u32) << 8;
    match hook {
        Hook::FromPod | Hook::NodeEgress | Hook::Socket => emit_packet(skb, ip, classified, limiter),
        Hook::HostNetwork | Hook::NodeAllow => emit_packet_in_cgroup(skb, ip, classified, limiter),
        Hook::LocalService => emit_received_packet(skb, ip, classified, limiter),
    }
}

/// Emits the event of a packet at a TC hook. A separate function, so that the verifier checks it once for all header
/// positions.
#[inline(never)]
fn emit_packet(skb: *mut __sk_buff, ip: IpOffset, classified: u32, limiter: &mut RateLimiter) {
    if let Some(event) = packet_event(skb, ip, classified, netns::from_socket(skb)) {
        emit(event, limiter);
    }
}

/// Emits the event of a packet that a socket of the node receives. The event has neither cookie nor cgroup, because the socket
/// belongs to the receiver.
#[inline(never)]
fn emit_received_packet(skb: *mut __sk_buff, ip: IpOffset, classified: u32, limiter: &mut RateLimiter) {
    if let Some(event) = packet_event(skb, ip, classified, SocketNetns::NoSocket) {
        emit(event, limiter);
    }
}

/// Emits the event of a packet at the `cgroup_skb` programs of `host_network` and `node_allow`, which can read the cgroup of
/// the socket.
#[inline(never)]
fn emit_packet_in_cgroup(skb: *mut __sk_buff, ip: IpOffset, classified: u32, limiter: &mut RateLimiter) {
    if let Some(event) = packet_event(skb, ip, classified, netns::from_socket_in_cgroup(skb)) {
        // SAFETY: the helper takes the context of a `cgroup_skb` program.
        let cgroup = unsafe { bpf_skb_cgroup_id(skb) };
        emit(Event { cgroup, ..event }, limiter);
    }
}

#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "the caller has packed both into the lower 16 bits")]
fn packet_event(skb: *mut __sk_buff, ip: IpOffset, classified: u32, socket: SocketNetns) -> Option<Event> {
    let packet = Skb::new(skb);
    let flow = flow(&packet, ip)?;
    let netns_cookie = match socket {
        SocketNetns::Cookie(cookie) => cookie,
        SocketNetns::NoSocket | SocketNetns::Unknown => 0,
    };
    Some(Event {
        netns_cookie,
        ifindex: packet.ifindex(),
        ingress_ifindex: packet.ingress_ifindex(),
        hook: classified as u8,
        verdict: (classified >> 8) as u8,
        ..new_event(flow)
    })
}

/// Emits the event of a call on a socket of the network namespace with this cookie, unless the source has reached its limit.
#[inline(always)]
pub(crate) fn report_call(
    hook: Hook,
    verdict: Verdict,
    netns_cookie: u64,
    flow: Flow,
    limiter: &mut RateLimiter,
) {
    if !may_emit(limiter, 0) {
        return;
    }
    let (hook, verdict) = (hook as u8, verdict as u8);
    let mut event = Event { netns_cookie, hook, verdict, ..new_event(flow) };
    // SAFETY: the helper takes no arguments; the caller is the current task.
    event.pid = (unsafe { bpf_get_current_pid_tgid() } >> 32) as u32;
    // SAFETY: the helper takes no arguments; the caller is the current task.
    event.cgroup = unsafe { bpf_get_current_cgroup_id() };
    // SAFETY: the buffer has the given length. The helper fails only without a task, and then writes zeros.
    let _no_task = unsafe { bpf_get_current_comm(event.comm.as_mut_ptr().cast(), COMM_LEN) };
    emit(event, limiter);
}

/// Returns an event with the current time and the fields of `flow`.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "the value is zero")]
fn new_event(flow: Flow) -> Event {
    // Hidden from the compiler, which would write many zeros with a call to memset. BPF does not have it.
    let zero = opaque(0);
    Event {
        time: now(),
        netns_cookie: zero,
        cgroup: zero,
        suppressed: zero,
        bytes: zero,
        source: flow.source,
        destination: flow.destination,
        ifindex: zero as u32,
        ingress_ifindex: zero as u32,
        pid: zero as u32,
        source_port: flow.source_port,
        destination_port: flow.destination_port,
        hook: zero as u8,
        verdict: zero as u8,
        protocol: flow.protocol,
        reserved: zero as u8,
        padding: zero as u32,
        comm: u128::from(zero).to_ne_bytes(),
    }
}

/// Emits the event with the counts since the previous one. If the ring buffer is full, the next event includes them.
#[inline(always)]
fn emit(event: Event, limiter: &mut RateLimiter) {
    let event = Event { suppressed: limiter.pending.wrapping_sub(1), bytes: limiter.bytes, ..event };
    if EVENTS.output_untyped::<Event>(&event, 0).is_ok() {
        limiter.clear();
    }
}

/// Returns the rate limiter of this source on this CPU, or `None` if the map has no room for it.
#[inline(always)]
pub(crate) fn rate_limiter(source: &RateLimitKey) -> Option<*mut RateLimiter> {
    let limiter = find_limiter(source.id, source.hook, source.verdict);
    (!limiter.is_null()).then_some(limiter)
}

/// Returns a null pointer if the map has no room. A separate function, so that the verifier checks its callers once for new
/// and existing rate limiters.
#[inline(never)]
fn find_limiter(id: u64, hook: u32, verdict: u32) -> *mut RateLimiter {
    let source = RateLimitKey { id, hook, verdict };
    if let Some(limiter) = RATE_LIMITERS.get_ptr_mut(source) {
        return limiter;
    }
    // If another CPU has inserted the source in the meantime, this writes only this CPU's value (bpf_percpu_hash_update).
    let _no_room = RATE_LIMITERS.insert(source, RateLimiter::new(), u64::from(BPF_ANY));
    RATE_LIMITERS.get_ptr_mut(source).unwrap_or(ptr::null_mut())
}

#[inline(always)]
fn may_emit(limiter: &mut RateLimiter, bytes: u32) -> bool {
    // SAFETY: the helper takes no arguments.
    let tick = unsafe { bpf_jiffies64() };
    limiter.allow(bytes, tick, now)
}

/// Returns the time in nanoseconds since boot (`CLOCK_BOOTTIME`).
#[inline(always)]
pub(crate) fn now() -> u64 {
    // SAFETY: the helper takes no arguments.
    unsafe { bpf_ktime_get_boot_ns() }
}
