//! Tells user space of packets and calls to guarded endpoints: a few of each source, and how many more there were.

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
    Event, Flow, Hook, Place, Verdict,
    event::{Admission, Source, Window},
    flow,
    opaque::opaque,
};

use crate::{
    netns::{self, Sender},
    packet::Skb,
};

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

/// Tells of a packet, unless enough was told of its source.
#[inline(always)]
pub(crate) fn packet(skb: *mut __sk_buff, place: Place, hook: Hook, verdict: Verdict, window: &mut Window) {
    let Some(Admission { time, suppressed }) = admit(window) else { return };
    let judged = hook as u32 | (verdict as u32) << 8;
    let told = match hook {
        Hook::PodEdge | Hook::NodeEdge | Hook::Socket => tell_packet(skb, place, judged, time, suppressed),
        Hook::Host => tell_packet_in_cgroup(skb, place, judged, time, suppressed),
    };
    if !told {
        window.suppressed += suppressed + 1;
    }
}

/// A function of its own, which is told little: the verifier then follows it once for all places of a header.
#[inline(never)]
fn tell_packet(skb: *mut __sk_buff, place: Place, judged: u32, time: u64, suppressed: u64) -> bool {
    let Some(event) = of_packet(skb, place, judged, netns::sender(skb)) else { return false };
    tell(Event { time, suppressed, ..event })
}

/// The same at a cgroup, whose programs may ask for other things.
#[inline(never)]
fn tell_packet_in_cgroup(skb: *mut __sk_buff, place: Place, judged: u32, time: u64, suppressed: u64) -> bool {
    let Some(event) = of_packet(skb, place, judged, netns::sender_in_cgroup(skb)) else { return false };
    // SAFETY: the helper takes the context of a program on packets.
    let cgroup = unsafe { bpf_skb_cgroup_id(skb) };
    tell(Event { time, suppressed, cgroup, ..event })
}

#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "packed above")]
fn of_packet(skb: *mut __sk_buff, place: Place, judged: u32, sender: Sender) -> Option<Event> {
    let packet = Skb::new(skb);
    let flow = flow(&packet, place)?;
    Some(Event {
        netns_cookie: match sender {
            Sender::Netns(cookie) => cookie,
            Sender::None | Sender::Unknown => 0,
        },
        ifindex: packet.ifindex(),
        ingress_ifindex: packet.ingress_ifindex(),
        hook: judged as u8,
        verdict: (judged >> 8) as u8,
        ..event(flow)
    })
}

/// Tells of a call on a socket of the network namespace with this cookie.
#[inline(always)]
pub(crate) fn call(hook: Hook, verdict: Verdict, netns_cookie: u64, flow: Flow, window: &mut Window) {
    let Some(Admission { time, suppressed }) = admit(window) else { return };
    let (hook, verdict) = (hook as u8, verdict as u8);
    let mut event = Event { time, suppressed, netns_cookie, hook, verdict, ..event(flow) };
    // SAFETY: the helper takes no arguments; the caller is the current task.
    event.pid = (unsafe { bpf_get_current_pid_tgid() } >> 32) as u32;
    // SAFETY: as above.
    event.cgroup = unsafe { bpf_get_current_cgroup_id() };
    // SAFETY: the buffer is as long as said. Where it fails, which it does without a task alone, it fills in zeros.
    let _no_task = unsafe { bpf_get_current_comm(event.comm.as_mut_ptr().cast(), COMM_LEN) };
    if !tell(event) {
        window.suppressed += suppressed + 1;
    }
}

/// An event with all that comes from its flow.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "zero")]
fn event(flow: Flow) -> Event {
    // Hidden from the compiler, which of many zeros in a row makes a call that the verifier refuses.
    let zero = opaque(0);
    Event {
        time: zero,
        netns_cookie: zero,
        cgroup: zero,
        suppressed: zero,
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

/// Whether there was room: where nobody reads, at some time there is none.
#[inline(always)]
fn tell(event: Event) -> bool {
    let Some(mut entry) = EVENTS.reserve_untyped::<Event>(0) else { return false };
    entry.write(event);
    entry.submit(0);
    true
}

/// What was told of this source on this CPU. `None` where there is no room for it.
#[inline(always)]
pub(crate) fn window(source: &Source) -> Option<*mut Window> {
    if let Some(window) = WINDOWS.get_ptr_mut(source) {
        return Some(window);
    }
    let first = Window::untold();
    // Where another CPU made it meanwhile, only this CPU's part is written (bpf_percpu_hash_update).
    let _no_room = WINDOWS.insert(source, first, u64::from(BPF_ANY));
    WINDOWS.get_ptr_mut(source)
}

#[inline(always)]
fn admit(window: &mut Window) -> Option<Admission> {
    // SAFETY: the helper takes no arguments; the verifier makes a load of the call.
    let tick = unsafe { bpf_jiffies64() };
    // SAFETY: as above, but that it is a call.
    window.admit(tick, || unsafe { bpf_ktime_get_boot_ns() })
}
