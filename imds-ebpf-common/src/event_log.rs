//! Layouts of the event log, in maps of user space: recent events, and counts of denials per sender. The programs do not
//! read them.

use crate::{
    Address, Event,
    maps::{LABEL_LEN, LONG_NAME_LEN, NAME_LEN},
};

/// Number of events that the log keeps.
pub const RECENT: usize = 1024;
/// Largest number of denial records: one for each sender and endpoint.
pub const DENIALS: usize = 2048;
/// Largest length of a cgroup path in a record, in bytes.
pub const CGROUP_PATH_LEN: usize = 256;

/// Entry of the log of recent events. While its two numbers differ, the entry is being written.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct RecentEvent {
    /// Number of the event, from 1.
    pub number: u64,
    /// The event, as the programs emitted it.
    pub event: Event,
    /// Number of the event again, at the end of the entry.
    pub number_again: u64,
}

/// Index of the number of the last event in [`MAP_RECENT_IDX`](crate::names::MAP_RECENT_IDX). The number is 0 before the
/// first event.
pub const WRITE_POS: u32 = 0;
/// Index of the number of the last event that a client has printed.
pub const READ_POS: u32 = 1;

/// Key of the map of denials. Pods of one namespace with equal service account and equal identifying label are one sender.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct DenialKey {
    /// Address of the protected endpoint.
    pub address: Address,
    /// Hash of the sender's identity.
    pub sender: u64,
    /// Number of the [`Hook`](crate::Hook) that denied.
    pub hook: u32,
    /// Number of the [`Verdict`](crate::Verdict): denied or audited.
    pub verdict: u32,
}

/// Denials of one sender. Text is padded with zero bytes; times are nanoseconds since the epoch.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct DenialRecord {
    /// Number of packets and calls.
    pub count: u64,
    /// Bytes of the packets, counted like [`Counter::bytes`](crate::Counter::bytes).
    pub bytes: u64,
    /// Time of the first denial.
    pub first: u64,
    /// Time of the last denial.
    pub last: u64,
    /// Namespace of the pod; empty if the pod is unknown.
    pub namespace: [u8; NAME_LEN],
    /// Service account of the pod.
    pub service_account: [u8; LONG_NAME_LEN],
    /// Label that identifies the application of the pod, as `key=value`.
    pub label: [u8; LABEL_LEN],
    /// Name of the pod that was denied last.
    pub pod: [u8; LONG_NAME_LEN],
    /// Ingress interface of packets; empty for calls.
    pub interface: [u8; 16],
    /// Name of the thread whose call was denied last; empty for packets.
    pub comm: [u8; 16],
    /// Path of the caller's cgroup, relative to the root of the hierarchy; empty if unknown.
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
    // SAFETY: repr(C), integers only, no padding: every bit pattern is a value.
    unsafe impl aya::Pod for DenialKey {}
    // SAFETY: repr(C), integers only, no padding: every bit pattern is a value.
    unsafe impl aya::Pod for DenialRecord {}
}
