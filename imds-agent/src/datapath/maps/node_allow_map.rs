//! Map of the allow list of the node.

use aya::maps::MapError;
use imds_ebpf_common::names::MAP_NODE_ALLOW;

use crate::{
    datapath::{
        Datapath, DatapathError,
        object::{self, Maps},
    },
    node::node_processes::AllowedProcesses,
};

/// Reads the allow list that the programs use.
pub fn read(maps: &Maps) -> Result<AllowedProcesses, MapError> {
    object::present(maps.node_allow.iter()).collect()
}

impl Datapath {
    /// Replaces the allow list of the node, whatever another program has written. Entries of both lists are in the map at every
    /// moment. Returns the number of map updates.
    pub fn set_node_allow(&mut self, desired: &AllowedProcesses) -> Result<usize, DatapathError> {
        write(&mut self.maps, desired).map_err(|source| DatapathError::Map { map: MAP_NODE_ALLOW, source })
    }

    /// Adds processes to the allow list of the node.
    pub fn add_node_allow(&mut self, more: &AllowedProcesses) -> Result<(), DatapathError> {
        let failed = |source| DatapathError::Map { map: MAP_NODE_ALLOW, source };
        let mut either = read(&self.maps).map_err(failed)?;
        either.extend(more);
        write(&mut self.maps, &either).map_err(failed)?;
        Ok(())
    }
}

/// Removes obsolete entries first, to make room.
fn write(maps: &mut Maps, desired: &AllowedProcesses) -> Result<usize, MapError> {
    let mut writes = 0;
    let mut present = read(maps)?;
    for process in present.keys().filter(|process| !desired.contains_key(process)) {
        object::removed(maps.node_allow.remove(process))?;
        writes += 1;
    }
    present.retain(|process, number| desired.get(process) == Some(number));
    for (process, number) in desired.iter().filter(|(process, _)| !present.contains_key(process)) {
        maps.node_allow.insert(process, number, 0)?;
        writes += 1;
    }
    Ok(writes)
}
