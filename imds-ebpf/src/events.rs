//! Tells user space of packets and calls to guarded endpoints: a few of each source, and how many more there were.

use aya_ebpf::{
    bindings::BPF_NOEXIST,
    btf_maps::{LruPerCpuHashMap, RingBuf},
    helpers::{
        bpf_get_current_comm,
        generated::{bpf_get_current_cgroup_id, bpf_get_current_pid_tgid, bpf_ktime_get_boot_ns},
    },
    macros::btf_map,
};
use imds_ebpf_common::{
    Event, Flow, Hook, Verdict,
    event::{Source, Window},
};

/// Room for some 2,500 events: what came last while nobody read is there for the next reader.
const RING_BYTES: usize = 256 * 1024;
const SOURCES: usize = 4096;

#[btf_map(name = "imds_events")]
static EVENTS: RingBuf<Event, RING_BYTES> = RingBuf::new();

/// Per CPU, so that no count is lost to another one's. A source that was not heard of for long is forgotten.
#[btf_map(name = "imds_sources")]
static WINDOWS: LruPerCpuHashMap<Source, Window, SOURCES> = LruPerCpuHashMap::new();

/// Tells of a packet that came in by interface `origin` and was judged at interface `ifindex`.
#[inline(always)]
pub(crate) fn packet(hook: Hook, verdict: Verdict, origin: u32, ifindex: u32, flow: impl FnOnce() -> Flow) {
    tell(hook, verdict, u64::from(origin), |event| {
        event.ifindex = ifindex;
        set_flow(event, flow());
    });
}

/// Tells of a call on a socket of the network namespace with this cookie.
#[inline(always)]
pub(crate) fn call(verdict: Verdict, netns_cookie: u64, flow: Flow) {
    tell(Hook::Socket, verdict, netns_cookie, |event| {
        event.netns_cookie = netns_cookie;
        // SAFETY: the helpers take no arguments; the caller is the current task.
        event.pid = (unsafe { bpf_get_current_pid_tgid() } >> 32) as u32;
        // SAFETY: as above.
        event.cgroup = unsafe { bpf_get_current_cgroup_id() };
        if let Ok(comm) = bpf_get_current_comm() {
            event.comm = comm;
        }
        set_flow(event, flow);
    });
}

#[inline(always)]
fn set_flow(event: &mut Event, flow: Flow) {
    event.source = flow.source;
    event.destination = flow.destination;
    event.source_port = flow.source_port;
    event.destination_port = flow.destination_port;
    event.protocol = flow.protocol;
}

#[inline(always)]
fn tell(hook: Hook, verdict: Verdict, source: u64, fill: impl FnOnce(&mut Event)) {
    // SAFETY: the helper takes no arguments.
    let time = unsafe { bpf_ktime_get_boot_ns() };
    let source = Source { id: source, hook: hook as u64 };
    let Some(suppressed) = admit(&source, time) else { return };
    let Some(mut entry) = EVENTS.reserve(0) else {
        // Nobody reads. It counts as one that was left out, and so do those that it would have told of.
        return add_suppressed(&source, suppressed + 1);
    };
    let event = entry.write(Event {
        time,
        suppressed,
        hook: hook as u8,
        verdict: verdict as u8,
        ..Event::default()
    });
    fill(event);
    entry.submit(0);
}

/// The events of this source that were left out before this one, where it may be told.
#[inline(always)]
fn admit(source: &Source, time: u64) -> Option<u64> {
    let Some(window) = WINDOWS.get_ptr_mut(source) else {
        let first = Window { start: time, told: 1, suppressed: 0 };
        // Where there is no room for it, events are told without a limit: of so many sources, each tells little.
        let _no_room = WINDOWS.insert(source, first, u64::from(BPF_NOEXIST));
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
