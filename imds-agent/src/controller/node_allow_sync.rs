//! Keeps the allow list of the node in its map.

use super::Reconciler;
use crate::{config::NodeProcess, datapath::DatapathError, node::node_processes::NodeProcesses};

impl Reconciler {
    /// Writes the allow list, as its cgroups are now.
    pub(super) fn reconcile_node_allow(&mut self) -> Result<(), DatapathError> {
        self.node_processes.broker_uid = self.broker_uid();
        let before = self.node_processes.resolved.clone();
        let map_updates = self.datapath.set_node_allow(self.node_processes.resolve())?;
        if map_updates > 0 {
            let level = if self.node_processes.resolved == before {
                self.change_log_level()
            } else {
                log::Level::Info
            };
            let count = self.node_processes.resolved.len();
            log::log!(level, "updated the allow list of the node: {count} entries active");
        }
        Ok(())
    }

    /// Writes the allow list if a cgroup of it was created, removed or replaced.
    pub(super) fn update_node_allow(&mut self) -> Result<(), DatapathError> {
        if self.node_processes.have_changed() { self.reconcile_node_allow() } else { Ok(()) }
    }

    /// Changes the entries of the allow list. Processes that lose their entry keep their access until
    /// [`Reconciler::reconcile_node_allow`].
    pub(super) fn change_node_allow(&mut self, entries: &[NodeProcess]) -> Result<(), DatapathError> {
        self.node_processes = NodeProcesses::new(entries.to_owned());
        self.node_processes.broker_uid = self.broker_uid();
        self.datapath.add_node_allow(self.node_processes.resolve())
    }
}
