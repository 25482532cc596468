//! Map of the allow list of the node.

use aya::maps::MapError;
use imds_ebpf_common::names::MAP_NODE_ALLOW;

use crate::{
    datapath::{
        Datapath, DatapathError, map_error,
        maps::pinned_maps,
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
        pinned_maps::sync(&mut self.maps.node_allow, desired).map_err(map_error(MAP_NODE_ALLOW))
    }

    /// Adds processes to the allow list of the node.
    pub fn add_node_allow(&mut self, more: &AllowedProcesses) -> Result<(), DatapathError> {
        let mut either = read(&self.maps).map_err(map_error(MAP_NODE_ALLOW))?;
        either.extend(more);
        self.set_node_allow(&either).map(drop)
    }
}
