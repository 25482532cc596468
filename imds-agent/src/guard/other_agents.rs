//! Other agents on this node: reported once, and not fought.

use imds_ebpf_common::AttachMode;

use super::Guard;
use crate::{
    datapath::other_agents::{self, OtherAgent},
    reconcile::Action,
};

/// The other agents that run on this node.
#[derive(Debug, Default)]
pub(super) struct OtherAgents {
    running: Vec<OtherAgent>,
    /// Agents that ran before this one started: of two, the later one yields.
    earlier: Vec<OtherAgent>,
}

impl Guard {
    /// Looks for other agents on this node, and logs each once.
    pub(super) fn find_other_agents(&mut self) {
        let found = other_agents::find(self.datapath.pins());
        let others = &mut self.other_agents;
        for agent in found.iter().filter(|agent| !others.running.contains(agent)) {
            log::error!("{agent}: {}", agent.remedy());
        }
        for agent in others.running.iter().filter(|agent| !found.contains(agent)) {
            log::info!("no agent runs any more with pins in {}", agent.pin_dir.display());
        }
        if !self.initial_sync_done {
            others.earlier.clone_from(&found);
        }
        others.earlier.retain(|agent| found.contains(agent));
        others.running = found;
    }

    /// Other agents that run on this node, for the line of the service manager.
    pub(super) fn other_agents(&self) -> impl Iterator<Item = &OtherAgent> {
        self.other_agents.running.iter()
    }

    /// Removes the actions on a filter that belongs to an agent that started earlier. Returns whether this agent then has no
    /// program at the hook.
    ///
    /// All agents name and number their filters alike, so that two agents would replace each other's for ever.
    pub(super) fn yield_to_earlier(&self, actions: &mut Vec<Action>) -> bool {
        if self.other_agents.earlier.is_empty() {
            return false;
        }
        let yields = actions.contains(&Action::Replace(AttachMode::Clsact));
        actions.retain(|action| match action {
            Action::Replace(mode) | Action::Detach(mode) => *mode != AttachMode::Clsact,
            Action::Reorder(mode) => !yields || *mode != AttachMode::Clsact,
            Action::Attach(_) | Action::Pin(_) => true,
        });
        yields
    }
}
