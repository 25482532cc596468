//! Records of the state of each interface, in a pinned map. `status`, `bpftool` and the agent after a restart read them.

use std::collections::BTreeSet;

use aya::maps::MapError;
use imds_ebpf_common::{AttachMode, InterfaceRecord, OwnPackets, Role, TcHook, names::MAP_INTERFACES};

use crate::{
    datapath::{
        Datapath, DatapathError, map_error,
        object::{self, Maps},
    },
    encode::{field_text, name_field},
    node::{interface_role::Assignment, link::Link},
};

/// Returns the record of an interface, or `None` if there is none.
pub fn get(maps: &Maps, ifindex: u32) -> Option<InterfaceRecord> {
    maps.interfaces.get(&ifindex, 0).ok()
}

/// Returns the names of all recorded interfaces with this role.
pub fn names(maps: &Maps, role: Role) -> Result<BTreeSet<String>, MapError> {
    let records = object::present(maps.interfaces.iter()).collect::<Result<Vec<_>, _>>()?;
    let of_role = records.into_iter().filter(|(_, record)| record.role == role as u8);
    Ok(of_role.map(|(_, record)| field_text(&record.name)).collect())
}

/// Reports whether the record of an interface has a filter.
pub(crate) fn has_filter(maps: &Maps, ifindex: u32) -> bool {
    get(maps, ifindex).is_some_and(|record| record.attach_modes.contains(&(AttachMode::Clsact as u8)))
}

/// State of an interface for its record.
#[derive(Clone, Copy, Debug)]
pub struct LinkState {
    /// Role and desired hooks of the interface.
    pub assignment: Assignment,
    /// Attach mode of each hook, in the order of [`TcHook::ALL`](imds_ebpf_common::TcHook::ALL).
    pub attach_modes: [AttachMode; 2],
    /// True while an attachment is in the attach queue.
    pub is_pending: bool,
}

impl LinkState {
    /// Sets the attach mode of one hook.
    pub fn set_mode(&mut self, hook: TcHook, mode: AttachMode) {
        let [from_pod, node_egress] = &mut self.attach_modes;
        *match hook {
            TcHook::FromPod => from_pod,
            TcHook::NodeEgress => node_egress,
        } = mode;
    }
}

impl Datapath {
    /// Records the state of an interface, for `status` and for the agent after a restart. Keeps `owns_qdisc` until the interface
    /// has no filter of the agent.
    pub fn record(&mut self, link: &Link, state: LinkState) -> Result<(), DatapathError> {
        let old = get(&self.maps, link.index).unwrap_or_default();
        let LinkState { assignment, attach_modes, is_pending } = state;
        let has_filter = attach_modes.contains(&AttachMode::Clsact);
        let new = InterfaceRecord {
            name: name_field(&link.name),
            role: assignment.role as u8,
            hooks: assignment.hooks.bits(),
            attach_modes: attach_modes.map(|mode| mode as u8),
            owns_qdisc: if has_filter { old.owns_qdisc } else { 0 },
            pending: u8::from(is_pending),
            ..old
        };
        write_change(&mut self.maps, link, assignment.role, old, new)
    }

    /// Updates the record of an interface after its master or its veth peer was reconciled.
    pub fn update_dependent(&mut self, link: &Link) -> Result<(), DatapathError> {
        let Some(old) = get(&self.maps, link.index) else { return Ok(()) };
        let Some(role) = Role::from_u8(old.role) else { return Ok(()) };
        write_change(&mut self.maps, link, role, old, old)
    }

    /// Reports whether the record of the interface has a program at this hook.
    pub fn was_attached(&self, link: &Link, hook: TcHook) -> bool {
        get(&self.maps, link.index).is_some_and(|record| record.is_attached(hook))
    }

    /// Reports whether the record of the interface has a pending attachment.
    pub fn was_pending(&self, link: &Link) -> bool {
        get(&self.maps, link.index)
            .is_some_and(|record| record.pending == 1 && record.name == name_field(&link.name))
    }

    /// Removes the state of a deleted interface whose index `link` has now.
    pub fn claim_ifindex(&mut self, link: &Link) -> Result<(), DatapathError> {
        let owns_qdisc = get(&self.maps, link.index)
            .is_some_and(|record| record.owns_qdisc == 1 && record.name == name_field(&link.name));
        self.remove_interface(link.index)?;
        // The name has not changed, so it is probably the same interface, and another program has removed the filter. The
        // qdisc still belongs to the agent.
        if owns_qdisc { set_owns_qdisc(&mut self.maps, link, TcHook::FromPod) } else { Ok(()) }
    }
}

/// Writes a record if it changes. Sets the fields that depend on the records of other interfaces.
fn write_change(
    maps: &mut Maps,
    link: &Link,
    role: Role,
    old: InterfaceRecord,
    new: InterfaceRecord,
) -> Result<(), DatapathError> {
    let new = InterfaceRecord {
        own_packets: own_packets(maps, link, role) as u8,
        sends_copies: u8::from(sends_copies(maps, link)),
        ..new
    };
    if new == old { Ok(()) } else { write(maps, link.index, new) }
}

/// Returns the packets received on the interface that are the node's own.
fn own_packets(maps: &Maps, link: &Link, role: Role) -> OwnPackets {
    match role {
        Role::Ifb => OwnPackets::Passed,
        _ if is_checked_at_peer(maps, link) => OwnPackets::Passed,
        // Excludes bridge ports: frames that a bridge forwards keep their socket, and the socket of frames from a tap device
        // belongs to the node.
        Role::Other | Role::Uplink | Role::Loopback | Role::Excluded if link.master.is_none() => {
            OwnPackets::WithSocket
        }
        Role::Other | Role::Uplink | Role::Loopback | Role::Excluded | Role::Pod | Role::Bridge => {
            OwnPackets::None
        }
    }
}

/// Reports whether copies of packets leave by the interface that have passed `node_egress` at its master.
fn sends_copies(maps: &Maps, link: &Link) -> bool {
    let master = link.master.filter(|_| link.is_copying_port);
    master.and_then(|master| get(maps, master)).is_some_and(|record| record.is_attached(TcHook::NodeEgress))
}

/// Reports whether packets received on the interface have passed `node_egress` at its veth peer. Only packets to a bridge port
/// are already routed and translated by DNAT then.
fn is_checked_at_peer(maps: &Maps, link: &Link) -> bool {
    let peer = link.lower.filter(|_| link.may_return_packets());
    peer.and_then(|peer| get(maps, peer)).is_some_and(|record| record.is_attached(TcHook::NodeEgress))
}

/// Records that the agent has added the qdisc of the interface, for a filter at `hook`.
pub(crate) fn set_owns_qdisc(maps: &mut Maps, link: &Link, hook: TcHook) -> Result<(), DatapathError> {
    let mut record = get(maps, link.index).unwrap_or_default();
    record.name = name_field(&link.name);
    if let Some(mode) = record.attach_modes.get_mut(hook as usize) {
        *mode = AttachMode::Clsact as u8;
    }
    record.owns_qdisc = 1;
    write(maps, link.index, record)
}

/// Records that the qdisc of the interface may belong to another program, so that `unload` does not remove it.
pub(crate) fn disown_qdisc(maps: &mut Maps, link: &Link) -> Result<(), DatapathError> {
    match get(maps, link.index) {
        Some(old) if old.owns_qdisc == 1 => write(maps, link.index, InterfaceRecord { owns_qdisc: 0, ..old }),
        _ => Ok(()),
    }
}

/// Removes the record of an interface, if it has one.
pub(crate) fn remove(maps: &mut Maps, ifindex: u32) {
    if let Err(error) = maps.interfaces.remove(&ifindex) {
        log::debug!("failed to remove the record of interface {ifindex}: {error}");
    }
}

fn write(maps: &mut Maps, ifindex: u32, record: InterfaceRecord) -> Result<(), DatapathError> {
    let failed = map_error(MAP_INTERFACES);
    maps.interfaces.insert(ifindex, record, 0).map_err(failed)
}
