//! The maps, private, beside their typed accessors.

use core::{hint, mem::offset_of};

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_F_NO_PREALLOC},
    btf_maps::{Array, HashMap, PerCpuHashMap},
    macros::btf_map,
};
use imds_ebpf_common::{
    Address, Answer, Counter, CounterKey, Endpoint, Exemption, Filter, Hook, InterfaceRecord, Mode, Policy,
    ProviderRecord, Subject, Tables, Verdict,
    endpoint::{MAX_CLOSED, MAX_ENDPOINTS},
    event::Window,
};

/// Interfaces that one node can have: far above the 1,000 pods that Kubernetes' largest nodes run.
const INTERFACES: usize = 16_384;
const COUNTERS: usize = (INTERFACES + Hook::ALL.len()) * Verdict::COUNTED.len();

#[btf_map(name = "imds_policy")]
static POLICY: Array<Policy, 1> = Array::new();

#[btf_map(name = "imds_counters")]
static COUNTS: PerCpuHashMap<CounterKey, Counter, COUNTERS, { BPF_F_NO_PREALLOC as usize }> =
    PerCpuHashMap::new();

/// Written and read by user space alone; it is here so that it has BTF and is pinned with the others.
#[btf_map(name = "imds_interfaces")]
static INTERFACE_RECORDS: HashMap<u32, InterfaceRecord, INTERFACES, { BPF_F_NO_PREALLOC as usize }> =
    HashMap::new();

/// As above.
#[btf_map(name = "imds_provider")]
static PROVIDER: Array<ProviderRecord, 1> = Array::new();

/// Room for the old and the new ones while user space replaces all of them.
#[btf_map(name = "imds_endpoints")]
static ENDPOINTS: HashMap<Address, Endpoint, { MAX_ENDPOINTS * 2 }, { BPF_F_NO_PREALLOC as usize }> =
    HashMap::new();

/// Two for each interface: it, and the network namespace that it leads to.
#[btf_map(name = "imds_exempt")]
static EXEMPTIONS: HashMap<Subject, Exemption, { INTERFACES * 2 }, { BPF_F_NO_PREALLOC as usize }> =
    HashMap::new();

/// Written by user space alone. The section's whole content: the map of that section has the size of this.
#[unsafe(no_mangle)]
static mut IMDS_FILTER: Filter = Filter::EMPTY;

/// What the maps say.
pub(crate) struct Maps;

impl Tables for Maps {
    #[inline(always)]
    fn may_guard(&self, slot: u16) -> bool {
        let (byte, bit) = Filter::position(slot);
        let byte = (&raw const IMDS_FILTER).cast::<u8>().wrapping_add(byte);
        // SAFETY: a slot's byte is one of the filter's. Nothing in this object writes it, which is why the read is
        // volatile.
        let byte = unsafe { byte.read_volatile() };
        byte >> bit & 1 == 1
    }

    #[inline(always)]
    fn closed(&self, address: &Address) -> Option<u32> {
        let [first, second] = address.halves();
        let closed =
            (&raw const IMDS_FILTER).cast::<u8>().wrapping_add(offset_of!(Filter, closed)).cast::<u64>();
        let ids =
            (&raw const IMDS_FILTER).cast::<u8>().wrapping_add(offset_of!(Filter, closed_ids)).cast::<u32>();
        for index in 0..MAX_CLOSED {
            let at = closed.wrapping_add(2 * index);
            // SAFETY: the first half of one of the closed addresses; volatile for the same reason as above.
            let one = unsafe { at.read_volatile() };
            // SAFETY: the second half.
            let other = unsafe { at.wrapping_add(1).read_volatile() };
            if one == first && other == second {
                // SAFETY: the number of that one.
                return Some(unsafe { ids.wrapping_add(index).read_volatile() });
            }
        }
        None
    }

    #[inline(always)]
    fn endpoint(&self, address: &Address) -> Option<&Endpoint> {
        // SAFETY: user space replaces values as a whole, and the kernel frees none under a running program.
        unsafe { ENDPOINTS.get(address) }
    }

    /// [`Mode::Enforce`] where it can't be read.
    #[inline(always)]
    fn mode(&self) -> Mode {
        POLICY.get(0).map_or(Mode::Enforce, |policy| Mode::from_u32(policy.mode))
    }
}

/// Cookie of the node's network namespace; `None` for the initial one.
#[inline(always)]
pub(crate) fn node_cookie() -> Option<u64> {
    POLICY.get(0).map(|policy| policy.netns_cookie).filter(|&cookie| cookie != 0)
}

/// Whether anybody is exempt from anything.
#[inline(always)]
pub(crate) fn has_exemptions() -> bool {
    POLICY.get(0).is_some_and(|policy| policy.exemptions != 0)
}

/// What this subject is granted.
#[inline(always)]
pub(crate) fn exemption(subject: &Subject) -> Option<&'static Exemption> {
    // SAFETY: user space replaces values as a whole, and the kernel frees none under a running program.
    unsafe { EXEMPTIONS.get(subject) }
}

/// The bit by which exempt packets are marked, where the pod edge is on and so vouches for it; 0 for none.
#[inline(always)]
pub(crate) fn mark() -> u32 {
    POLICY.get(0).filter(|policy| policy.hooks & Hook::PodEdge.bit() != 0).map_or(0, |policy| policy.mark)
}

/// What a denied sender is told.
#[inline(always)]
pub(crate) fn answer() -> Answer {
    POLICY.get(0).map_or(Answer::Drop, |policy| Answer::from_u32(policy.answer))
}

/// Adds a packet of `bytes` bytes, and returns this CPU's counter. Where the map is full the packet goes uncounted: the
/// verdict never depends on it.
#[inline(always)]
pub(crate) fn count(ifindex: u32, hook: Hook, verdict: Verdict, bytes: u32) -> Option<*mut Counter> {
    let key = CounterKey::new(ifindex, hook, verdict);
    let counter = COUNTS.get_ptr_mut(&key).or_else(|| first_counter(&key))?;
    // SAFETY: the map owns the value and nothing frees it under a running program; it is this CPU's own, and programs
    // at TC run in softirq context or with it disabled, which another one on the same CPU does not interrupt.
    let counted = unsafe { &mut *counter };
    counted.packets += 1;
    counted.bytes += u64::from(bytes);
    Some(counter)
}

/// User space makes the entry when it attaches the interface; this is for a packet that comes before.
#[inline(always)]
fn first_counter(key: &CounterKey) -> Option<*mut Counter> {
    let zero = hint::black_box(0_u64);
    let window =
        Window { start: zero, tick: zero, suppressed: zero, told: zero as u32, answered: zero as u32 };
    // Where another CPU made one meanwhile, only this CPU's part of it is written (bpf_percpu_hash_update).
    let _full = COUNTS.insert(key, Counter { packets: zero, bytes: zero, window }, u64::from(BPF_ANY));
    COUNTS.get_ptr_mut(key)
}
