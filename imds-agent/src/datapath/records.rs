//! What the agent knows of each interface, in a pinned map: for `status`, for `bpftool`, and for the next agent.

use std::collections::BTreeSet;

use aya::maps::MapError;
use imds_ebpf_common::{AttachMode, InterfaceRecord, Role, names::MAP_INTERFACES};

use super::{
    DatapathError,
    object::{self, Maps},
};
use crate::{endpoints::unpadded, node::links::Link};

/// The record of an interface.
#[must_use]
pub fn get(maps: &Maps, ifindex: u32) -> Option<InterfaceRecord> {
    maps.interfaces.get(&ifindex, 0).ok()
}

/// Names of all interfaces of a role.
pub fn names(maps: &Maps, role: Role) -> Result<BTreeSet<String>, MapError> {
    let records = object::present(maps.interfaces.iter()).collect::<Result<Vec<_>, _>>()?;
    let of_role = records.into_iter().filter(|(_, record)| record.role == role as u8);
    Ok(of_role.map(|(_, record)| unpadded(&record.name)).collect())
}

/// Whether an agent recorded a filter on an interface.
pub(super) fn has_filter(maps: &Maps, ifindex: u32) -> bool {
    get(maps, ifindex).is_some_and(|record| record.backend == AttachMode::Clsact as u8)
}

/// Writes what an interface is and how it is guarded. That an agent made its qdisc stays known until it has no filter
/// of ours.
pub(super) fn put(
    maps: &mut Maps,
    link: &Link,
    role: Role,
    backend: AttachMode,
) -> Result<(), DatapathError> {
    let old = get(maps, link.index).unwrap_or_default();
    let made_qdisc = if backend == AttachMode::Clsact { old.made_qdisc } else { 0 };
    let new = InterfaceRecord {
        name: padded(&link.name),
        role: role as u8,
        backend: backend as u8,
        made_qdisc,
        reserved: 0,
    };
    if new == old { Ok(()) } else { write(maps, link.index, new) }
}

/// Notes that the interface's qdisc is the agent's own doing.
pub(super) fn mark_qdisc(maps: &mut Maps, link: &Link) -> Result<(), DatapathError> {
    let mut record = get(maps, link.index).unwrap_or_default();
    record.name = padded(&link.name);
    record.backend = AttachMode::Clsact as u8;
    record.made_qdisc = 1;
    write(maps, link.index, record)
}

/// Removes an interface's record, if there is one.
pub(super) fn remove(maps: &mut Maps, ifindex: u32) {
    if let Err(error) = maps.interfaces.remove(&ifindex) {
        log::debug!("no record of interface {ifindex} to remove: {error}");
    }
}

fn write(maps: &mut Maps, ifindex: u32, record: InterfaceRecord) -> Result<(), DatapathError> {
    let failed = |source| DatapathError::Map { map: MAP_INTERFACES, source };
    maps.interfaces.insert(ifindex, record, 0).map_err(failed)
}

/// An interface name as the kernel keeps it: at most 15 bytes, then zeros.
pub(super) fn padded(name: &str) -> [u8; 16] {
    let mut padded = [0; 16];
    for (to, from) in padded.iter_mut().zip(name.bytes().take(15)) {
        *to = from;
    }
    padded
}
