//! Tells user space of packets and calls to guarded endpoints: a few of each source, and how many more there were.

use core::hint;

use aya_ebpf::{
    bindings::{__sk_buff, BPF_ANY},
    btf_maps::{LruPerCpuHashMap, RingBuf},
    helpers::generated::{
        bpf_get_current_cgroup_id, bpf_get_current_comm, bpf_get_current_pid_tgid, bpf_ktime_get_boot_ns,
    },
    macros::btf_map,
};
use imds_ebpf_common::{
    Event, Flow, Hook, Place, Verdict,
    event::{Source, Window},
    flow,
};

use crate::packet::Skb;

/// Room for some 2,500 events: what came last while nobody read is there for the next reader.
const RING_BYTES: usize = 256 * 1024;
const SOURCES: usize = 4096;
/// Bytes of a thread's name (`TASK_COMM_LEN`, include/linux/sched.h).
const COMM_LEN: u32 = 16;

/// Of [`Event`]s; libbpf takes no ring buffer that names its type.
#[btf_map(name = "imds_events")]
static EVENTS: RingBuf<(), RING_BYTES> = RingBuf::new();

/// Per CPU, so that no count is lost to another one's. A source that was not heard of for long is forgotten.
#[btf_map(name = "imds_sources")]
static WINDOWS: LruPerCpuHashMap<Source, Window, SOURCES> = LruPerCpuHashMap::new();

/// Tells of a packet that came in by interface `origin` and was judged at its own.
///
/// A function of its own, which is told little: the verifier then follows it once for all places of a header.
#[inline(never)]
pub(crate) fn packet(skb: *mut __sk_buff, place: Place, hook: Hook, verdict: Verdict, origin: u32) {
    let skb = Skb::new(skb);
    let source = Source { id: u64::from(origin), hook: hook as u64 };
    // SAFETY: the helper takes no arguments.
    let time = unsafe { bpf_ktime_get_boot_ns() };
    let Some(suppressed) = admit(&source, time) else { return };
    let Some(flow) = flow(&skb, place) else { return };
    tell(&source, Event { time, suppressed, ifindex: skb.ifindex(), ..event(hook, verdict, flow) });
}

/// Tells of a call on a socket of the network namespace with this cookie.
#[inline(always)]
pub(crate) fn call(verdict: Verdict, netns_cookie: u64, flow: Flow) {
    let source = Source { id: netns_cookie, hook: Hook::Socket as u64 };
    // SAFETY: the helper takes no arguments.
    let time = unsafe { bpf_ktime_get_boot_ns() };
    let Some(suppressed) = admit(&source, time) else { return };
    let mut event = Event { time, suppressed, netns_cookie, ..event(Hook::Socket, verdict, flow) };
    // SAFETY: the helper takes no arguments; the caller is the current task.
    event.pid = (unsafe { bpf_get_current_pid_tgid() } >> 32) as u32;
    // SAFETY: as above.
    event.cgroup = unsafe { bpf_get_current_cgroup_id() };
    // SAFETY: the buffer is as long as said. Where it fails, which it does without a task alone, it fills in zeros.
    let _no_task = unsafe { bpf_get_current_comm(event.comm.as_mut_ptr().cast(), COMM_LEN) };
    tell(&source, event);
}

/// An event with all that is alike for packets and calls.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "zero")]
fn event(hook: Hook, verdict: Verdict, flow: Flow) -> Event {
    // Hidden from the compiler, which of many zeros in a row makes a call that the verifier refuses.
    let zero = hint::black_box(0_u64);
    Event {
        time: zero,
        netns_cookie: zero,
        cgroup: zero,
        suppressed: zero,
        source: flow.source,
        destination: flow.destination,
        ifindex: zero as u32,
        pid: zero as u32,
        source_port: flow.source_port,
        destination_port: flow.destination_port,
        hook: hook as u8,
        verdict: verdict as u8,
        protocol: flow.protocol,
        reserved: zero as u8,
        comm: u128::from(zero).to_ne_bytes(),
    }
}

#[inline(always)]
fn tell(source: &Source, event: Event) {
    match EVENTS.reserve_untyped::<Event>(0) {
        Some(mut entry) => {
            entry.write(event);
            entry.submit(0);
        }
        // Nobody reads. It counts as one that was left out, and so do those that it would have told of.
        None => add_suppressed(source, event.suppressed + 1),
    }
}

/// The events of this source that were left out before this one, where it may be told.
#[inline(always)]
fn admit(source: &Source, time: u64) -> Option<u64> {
    let Some(window) = WINDOWS.get_ptr_mut(source) else {
        let first = Window { start: time, told: 1, suppressed: 0 };
        // Where another CPU made it meanwhile, only this CPU's part is written (bpf_percpu_hash_update). Where there is
        // no room for it, events are told without a limit: of so many sources, each tells little.
        let _no_room = WINDOWS.insert(source, first, u64::from(BPF_ANY));
        return Some(0);
    };
    // SAFETY: this CPU's own, and the map keeps it as long as a program runs that found it.
    unsafe { (*window).admit(time) }
}

#[inline(always)]
fn add_suppressed(source: &Source, suppressed: u64) {
    if let Some(window) = WINDOWS.get_ptr_mut(source) {
        // SAFETY: as above.
        unsafe { (*window).suppressed += suppressed };
    }
}
