//! What user space keeps of events: the last ones, and who was denied what how often. The programs don't read it.

use crate::{
    Address, Event,
    maps::{LABEL_LEN, LONG_NAME_LEN, NAME_LEN},
};

/// How many of the last events are kept.
pub const RECENT: usize = 1024;
/// How many senders and endpoints are kept apart.
pub const DENIALS: usize = 2048;
/// Most bytes of a cgroup's path that are kept.
pub const CGROUP_PATH_LEN: usize = 256;

/// One of the last events. Whose two numbers differ is being written.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct RecentEvent {
    /// Its number, from 1.
    pub number: u64,
    /// The event.
    pub event: Event,
    /// Its number again.
    pub number_again: u64,
}

/// Where the number of the last event is; 0 before the first.
pub const LAST: u32 = 0;
/// Where the number of the last event is that was shown to somebody.
pub const SHOWN: u32 = 1;

/// Whose denials are counted together. All pods of a namespace that have the same service account and the same telling label
/// are one sender, whichever of them it was.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct DenialKey {
    /// The endpoint's address.
    pub address: Address,
    /// A number that follows from who the sender is.
    pub sender: u64,
    /// A [`Hook`](crate::Hook).
    pub hook: u32,
    /// A [`Verdict`](crate::Verdict).
    pub verdict: u32,
}

/// Denials of one sender. Text is padded with zero bytes; times are nanoseconds since the epoch.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct DenialRecord {
    /// How many packets or calls.
    pub count: u64,
    /// Bytes of these packets, as [`Counter::bytes`](crate::Counter::bytes) has them.
    pub bytes: u64,
    /// When the first was.
    pub first: u64,
    /// When the last was.
    pub last: u64,
    /// Namespace of the pod; empty where no pod is known.
    pub namespace: [u8; NAME_LEN],
    /// Its service account.
    pub service_account: [u8; LONG_NAME_LEN],
    /// A label that says what it runs, as `key=value`.
    pub label: [u8; LABEL_LEN],
    /// Name of the pod that was last.
    pub pod: [u8; LONG_NAME_LEN],
    /// Interface by which packets came in; empty for calls.
    pub interface: [u8; 16],
    /// Name of the thread that called last; empty for packets.
    pub comm: [u8; 16],
    /// cgroup of the caller, below the root of the hierarchy; empty where it is not known.
    pub cgroup: [u8; CGROUP_PATH_LEN],
}

const _: () = assert!(size_of::<RecentEvent>() == 128);
const _: () = assert!(size_of::<DenialKey>() == 32);
const _: () = assert!(size_of::<DenialRecord>() == 32 + 64 + 256 + 192 + 256 + 32 + 256);

#[cfg(feature = "user")]
mod pod {
    use super::{DenialKey, DenialRecord, RecentEvent};

    // SAFETY: repr(C), integers only, no padding: every bit pattern is a value.
    unsafe impl aya::Pod for RecentEvent {}
    // SAFETY: as above.
    unsafe impl aya::Pod for DenialKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for DenialRecord {}
}
