//! Maps of the programs, and typed functions that access them.

use core::{mem::offset_of, ptr};

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_F_NO_PREALLOC},
    btf_maps::{Array, HashMap, LruHashMap, PerCpuHashMap},
    macros::btf_map,
};
use imds_ebpf_common::{
    Address, AllowedProcess, CgroupRecord, ConfigRecord, Counter, CounterKey, DenyAction, Endpoint,
    ExemptionKey, ExemptionRecord, Hook, InterfaceRecord, KubernetesRecord, ListenerKey, Mode, PodRecord,
    Policy, PolicyFilter, PolicyLookup, ProbeRecord, ProviderRecord, RedirectRecord, Subject, Verdict,
    allow_list::MAX_ALLOWED,
    endpoint::{AllowedPorts, MAX_ENDPOINTS},
    event::RateLimiter,
    event_log::{DENIALS, DenialKey, DenialRecord, RECENT, RecentEvent},
    exemption::MAX_EXEMPTIONS,
    filter::{BUCKETS, MAX_BUCKET_LEN, bucket},
    names::PROGRAM_COUNT,
    opaque::{opaque, opaque_pointer},
    redirect::MAX_LISTENERS,
};

use crate::events::now;

/// Largest number of interfaces of a node. Large nodes run 1,000 pods.
const MAX_INTERFACES: usize = 16_384;
const MAX_COUNTERS: usize = (MAX_INTERFACES + Hook::ALL.len()) * Verdict::COUNTED.len();

#[btf_map(name = "imds_policy")]
static POLICY: Array<Policy, 1> = Array::new();

#[btf_map(name = "imds_counters")]
static COUNTERS: PerCpuHashMap<CounterKey, Counter, MAX_COUNTERS, { BPF_F_NO_PREALLOC as usize }> =
    PerCpuHashMap::new();

/// Records of the node's interfaces. User space writes them; the programs read the attach modes and
/// [`InterfaceRecord::own_packets`].
#[btf_map(name = "imds_interfaces")]
static INTERFACE_RECORDS: HashMap<u32, InterfaceRecord, MAX_INTERFACES, { BPF_F_NO_PREALLOC as usize }> =
    HashMap::new();

/// For user space only. The object defines the map so that it has BTF and a pin.
#[btf_map(name = "imds_provider")]
static PROVIDER: Array<ProviderRecord, 1> = Array::new();

/// For user space only. The object defines the map so that it has BTF and a pin.
#[btf_map(name = "imds_config")]
static CONFIG: Array<ConfigRecord, 1> = Array::new();

/// User space writes the record. The programs read only the id of the cgroup.
#[btf_map(name = "imds_cgroup")]
static CGROUP: Array<CgroupRecord, 1> = Array::new();

/// For user space only. The object defines the map so that it has BTF and a pin.
#[btf_map(name = "imds_rejected")]
static REJECTED: Array<u32, PROGRAM_COUNT> = Array::new();

/// For user space only: the programs read endpoints from [`IMDS_FILTER`]. Has room for the old and the new endpoints.
#[btf_map(name = "imds_endpoints")]
static ENDPOINT_RECORDS: HashMap<Address, Endpoint, { MAX_ENDPOINTS * 2 }, { BPF_F_NO_PREALLOC as usize }> =
    HashMap::new();

/// For user space only. The object defines the map so that it has BTF and a pin.
#[btf_map(name = "imds_kubernetes")]
static KUBERNETES: Array<KubernetesRecord, 1> = Array::new();

/// For user space only. The object defines the map so that it has BTF and a pin.
#[btf_map(name = "imds_pods")]
static PODS: HashMap<Subject, PodRecord, MAX_EXEMPTIONS, { BPF_F_NO_PREALLOC as usize }> = HashMap::new();

/// For user space only. The object defines the map so that it has BTF and a pin.
#[btf_map(name = "imds_recent")]
static RECENT_EVENTS: Array<RecentEvent, RECENT> = Array::new();

/// For user space only. The object defines the map so that it has BTF and a pin.
#[btf_map(name = "imds_recent_idx")]
static RECENT_IDX: Array<u64, 2> = Array::new();

/// For user space only. The object defines the map so that it has BTF and a pin.
#[btf_map(name = "imds_denials")]
static DENIAL_RECORDS: HashMap<DenialKey, DenialRecord, DENIALS, { BPF_F_NO_PREALLOC as usize }> =
    HashMap::new();

#[btf_map(name = "imds_exempt")]
static EXEMPTIONS: HashMap<ExemptionKey, ExemptionRecord, MAX_EXEMPTIONS, { BPF_F_NO_PREALLOC as usize }> =
    HashMap::new();

/// The policy, written only by user space. No other variable may be in its section: the size of the section's map must be
/// the size of the filter.
#[unsafe(no_mangle)]
static mut IMDS_FILTER: PolicyFilter = PolicyFilter::EMPTY;

/// Source addresses of exempt pods, by the host-side interface of the pod and by its bridge. The node's own addresses have the
/// interface 0.
#[btf_map(name = "imds_exempt_src")]
static EXEMPT_SOURCES: HashMap<ExemptionKey, u32, { MAX_EXEMPTIONS * 4 }, { BPF_F_NO_PREALLOC as usize }> =
    HashMap::new();

/// Number of interfaces in [`EXEMPT_USE`], whose entries the kernel allocates in advance.
const EXEMPT_INTERFACES: usize = 4096;

/// Time of the last packet that `from_pod` let pass by an exemption, by interface. An LRU map, so that the program can add an
/// interface, and no process has to remove it.
#[btf_map(name = "imds_exempt_use")]
static EXEMPT_USE: LruHashMap<u32, u64, EXEMPT_INTERFACES> = LruHashMap::new();

/// Listeners of scoped exemptions, by netns cookie and endpoint.
#[btf_map(name = "imds_redirect")]
static REDIRECTS: HashMap<ExemptionKey, RedirectRecord, MAX_LISTENERS, { BPF_F_NO_PREALLOC as usize }> =
    HashMap::new();

/// Endpoints of the listeners in [`REDIRECTS`]. Has room for the old and the new listeners while the agent replaces them.
#[btf_map(name = "imds_listeners")]
static LISTENERS: HashMap<ListenerKey, Address, { MAX_LISTENERS * 2 }, { BPF_F_NO_PREALLOC as usize }> =
    HashMap::new();

/// Largest number of test senders: `imds-agent verify` uses a few.
const MAX_PROBES: usize = 64;

#[btf_map(name = "imds_probes")]
static PROBES: HashMap<Subject, ProbeRecord, MAX_PROBES, { BPF_F_NO_PREALLOC as usize }> = HashMap::new();

/// Number of entries in [`PROBES`]. An array, because the verifier replaces a lookup in an array by a load.
#[btf_map(name = "imds_probing")]
static PROBING: Array<u32, 1> = Array::new();

/// Allow list of the node. Has room for the old and the new entries, because both are valid during a reload.
#[btf_map(name = "imds_node_allow")]
static NODE_ALLOW: HashMap<AllowedProcess, u32, { MAX_ALLOWED * 2 }, { BPF_F_NO_PREALLOC as usize }> =
    HashMap::new();

/// Policy lookup in the maps of this object.
pub(crate) struct Maps;

impl PolicyLookup for Maps {
    #[inline(always)]
    fn may_be_protected(&self, slot: u16) -> bool {
        has_bit(0, slot)
    }

    #[inline(always)]
    fn allowed_ports(&self, slot: u16, address: &Address) -> Option<&AllowedPorts> {
        let allowed_ports = find_allowed_ports(bucket(slot) as u64, address);
        // SAFETY: the pointer is null or points into a variable of this object.
        unsafe { allowed_ports.as_ref() }
    }

    /// Returns [`Mode::Enforce`] if the policy can't be read.
    #[inline(always)]
    fn mode(&self) -> Mode {
        POLICY.get(0).map_or(Mode::Enforce, |policy| Mode::from_u32(policy.mode))
    }

    #[inline(always)]
    fn may_be_exempt(&self, slot: u16) -> bool {
        has_bit(offset_of!(PolicyFilter, subjects), slot)
    }

    #[inline(always)]
    fn exemption(&self, key: &ExemptionKey) -> Option<ExemptionRecord> {
        // SAFETY: the value is copied at once; an entry that user space replaces in the meantime keeps valid numbers.
        unsafe { EXEMPTIONS.get(key) }.copied()
    }
}

/// Returns the allowed ports of the endpoint at `address` in this bucket of the filter, or null. A separate function, so that
/// the verifier checks its callers once for all entries.
///
/// The table does not change while a program reads it: user space writes the other table, after an RCU grace period in
/// which all programs have stopped reading that one.
#[inline(never)]
#[expect(clippy::cast_possible_truncation, reason = "usize has 64 bits on BPF")]
fn find_allowed_ports(bucket: u64, address: &Address) -> *const AllowedPorts {
    // Opaque, because the compiler would use the initial value: no code in this object writes the variable.
    let filter = opaque_pointer(&raw const IMDS_FILTER);
    // SAFETY: the pointer to a static is always valid, and user space does not write the effective table.
    let filter = unsafe { &*filter };
    let table = &filter.tables[filter.current as usize & 1];
    // Verifiers before Linux 6.10 do not track bounds through the XOR that computes the bucket, so the remainder is needed.
    let mut number = u64::from(table.heads[opaque(bucket) as usize % BUCKETS]);
    for _ in 0..MAX_BUCKET_LEN {
        if number == 0 {
            return ptr::null();
        }
        let entry = &table.entries[opaque(number - 1) as usize % MAX_ENDPOINTS];
        if entry.address.halves() == address.halves() {
            return &raw const entry.allowed_ports;
        }
        number = entry.next;
    }
    ptr::null()
}

/// Reports whether the bit of a slot is set in the bitmap at byte `offset` of the filter.
#[inline(always)]
fn has_bit(offset: usize, slot: u16) -> bool {
    let (byte, bit) = PolicyFilter::position(slot);
    let byte = (&raw const IMDS_FILTER).cast::<u8>().wrapping_add(offset + byte);
    // SAFETY: every 16-bit slot of the bitmap is within the filter. The read is volatile, because user space writes the byte.
    let byte = unsafe { byte.read_volatile() };
    byte >> bit & 1 == 1
}

/// Reports whether the map has an exemption with this key.
#[inline(always)]
pub(crate) fn has_exemption(key: &ExemptionKey) -> bool {
    EXEMPTIONS.get_ptr(key).is_some()
}

/// Reports whether the source address in `key` belongs to the subject in it.
#[inline(always)]
pub(crate) fn is_exempt_source(key: &ExemptionKey) -> bool {
    // SAFETY: the value is not read, only its presence.
    unsafe { EXEMPT_SOURCES.get(key) }.is_some()
}

/// Records that `from_pod` lets a packet pass by the exemption of this interface.
#[inline(always)]
pub(crate) fn record_exempt_use(ifindex: u32) {
    let _full = EXEMPT_USE.insert(ifindex, now(), u64::from(BPF_ANY));
}

/// Maximum time between `from_pod` and `node_egress` for one packet, in nanoseconds: shaping delays packets by seconds.
const MAX_TRANSIT_NS: u64 = 3_000_000_000;

/// Reports whether `from_pod` has let a packet of this interface pass by an exemption within [`MAX_TRANSIT_NS`].
#[inline(always)]
pub(crate) fn is_exempt_use_recent(ifindex: u32) -> bool {
    // SAFETY: the value is an integer of eight aligned bytes, which programs replace at once.
    unsafe { EXEMPT_USE.get(ifindex) }.is_some_and(|&used| now().saturating_sub(used) < MAX_TRANSIT_NS)
}

/// Returns the port of the listener for connections to the endpoint in `key` from the network namespace in it, and the rule; the
/// port is 0 for none.
#[inline(always)]
pub(crate) fn listener(key: &ExemptionKey) -> (u32, u32) {
    // SAFETY: the values are aligned integers, which stay valid if user space replaces the entry in the meantime.
    unsafe { REDIRECTS.get(key) }.map_or((0, 0), |record| (record.port, record.rule))
}

/// Returns the endpoint whose connections are redirected to a listener.
#[inline(always)]
pub(crate) fn redirected_endpoint(listener: &ListenerKey) -> Option<Address> {
    // SAFETY: the value is copied at once, and user space does not replace entries, but removes and adds them.
    unsafe { LISTENERS.get(listener) }.copied()
}

/// Reports whether the allow list of the node contains `process`.
#[inline(always)]
pub(crate) fn is_allowed(process: &AllowedProcess) -> bool {
    NODE_ALLOW.get_ptr(process).is_some()
}

/// Reports whether any test sender is registered.
#[inline(always)]
pub(crate) fn has_probes() -> bool {
    PROBING.get(0).is_some_and(|&count| count != 0)
}

/// Returns the record of a test sender, or `None` if `subject` is none.
#[inline(always)]
pub(crate) fn probe(subject: &Subject) -> Option<*mut ProbeRecord> {
    PROBES.get_ptr_mut(subject)
}

/// Returns the record of an interface of the node, or `None` if the agent has not written one.
#[inline(always)]
pub(crate) fn interface(ifindex: u32) -> Option<&'static InterfaceRecord> {
    // SAFETY: the programs read only single bytes, which stay valid if user space replaces the entry in the meantime.
    unsafe { INTERFACE_RECORDS.get(ifindex) }
}

/// Reports whether the configuration enables this hook.
#[inline(always)]
pub(crate) fn is_enabled(hook: Hook) -> bool {
    POLICY.get(0).is_some_and(|policy| policy.hooks & hook.bit() != 0)
}

/// Returns the cookie of the node's network namespace, or `None` if that is the initial one.
#[inline(always)]
pub(crate) fn node_cookie() -> Option<u64> {
    POLICY.get(0).map(|policy| policy.netns_cookie).filter(|&cookie| cookie != 0)
}

/// Returns the id of the cgroup to which the agent attaches its programs; 0 if it has not recorded one.
#[inline(always)]
pub(crate) fn agent_cgroup() -> u64 {
    CGROUP.get(0).map_or(0, |record| record.cgroup)
}

/// Largest errno (`MAX_ERRNO`, include/linux/err.h). The verifier of Linux 7 checks the range of an error that a program sets.
const MAX_ERRNO: u32 = 4095;

/// Returns the error of a denied call as a negative errno.
#[inline(always)]
pub(crate) fn denied_retval() -> i32 {
    POLICY.get(0).map_or(0, |policy| (policy.on_deny_errno & MAX_ERRNO).cast_signed().wrapping_neg())
}

/// Reports whether denied packets get a reply.
#[inline(always)]
pub(crate) fn replies_to_denied() -> bool {
    POLICY.get(0).is_some_and(|policy| DenyAction::from_u32(policy.on_deny).replies())
}

/// Counts a packet of `bytes` bytes, and returns this CPU's counter. Returns `None` without counting if the map is full; the
/// verdict never depends on it.
#[inline(always)]
pub(crate) fn count(ifindex: u32, hook: Hook, verdict: Verdict, bytes: u32) -> Option<*mut Counter> {
    let counter = count_classified(ifindex, hook as u32, verdict as u32, bytes);
    (!counter.is_null()).then_some(counter)
}

/// Returns a null pointer if the map is full. A separate function, so that the verifier checks its callers once for new and
/// existing counters.
#[inline(never)]
#[expect(clippy::cast_possible_truncation, reason = "hooks and verdicts are small numbers")]
fn count_classified(ifindex: u32, hook: u32, verdict: u32, bytes: u32) -> *mut Counter {
    let key = CounterKey { ifindex, hook: hook as u8, verdict: verdict as u8, reserved: 0 };
    let Some(counter) = COUNTERS.get_ptr_mut(key).or_else(|| first_counter(&key)) else {
        return ptr::null_mut();
    };
    // SAFETY: the map owns the value, and does not free it while the program that looked it up runs. The value belongs to this
    // CPU, and TC programs run in softirq context or with softirqs disabled, so no other one interrupts them on this CPU.
    let sum = unsafe { &mut *counter };
    sum.packets += 1;
    sum.bytes += u64::from(bytes);
    counter
}

/// Creates the counter of a key for its first packet. User space has usually created it when attaching to the interface.
#[inline(always)]
fn first_counter(key: &CounterKey) -> Option<*mut Counter> {
    let limiter = RateLimiter::new();
    // If another CPU has inserted the key in the meantime, this writes only this CPU's value (bpf_percpu_hash_update).
    let _full =
        COUNTERS.insert(key, Counter { packets: opaque(0), bytes: opaque(0), limiter }, u64::from(BPF_ANY));
    COUNTERS.get_ptr_mut(key)
}
