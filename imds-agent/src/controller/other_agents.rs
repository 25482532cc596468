//! Other agents on this node: the agent reports them once, and does not replace their filters.

use imds_ebpf_common::AttachMode;

use super::Reconciler;
use crate::datapath::{
    attach::attachment::Action,
    pin::agents::{self, OtherAgent},
};

/// Other agents that run on this node.
#[derive(Debug, Default)]
pub(super) struct OtherAgents {
    pub(super) running: Vec<OtherAgent>,
    /// Agents that ran before this one started. This agent yields to them.
    earlier: Vec<OtherAgent>,
}

impl Reconciler {
    /// Looks for other agents on this node, and logs each one once.
    pub(super) fn find_other_agents(&mut self) {
        let found = agents::find(self.datapath.pins());
        let others = &mut self.other_agents;
        for agent in found.iter().filter(|agent| !others.running.contains(agent)) {
            log::error!("{agent}: {}", agent.remedy());
        }
        for agent in others.running.iter().filter(|agent| !found.contains(agent)) {
            log::info!("the other agent with pins in {} has stopped", agent.pin_dir.display());
        }
        if !self.progress.initial_sync_done {
            others.earlier.clone_from(&found);
        }
        others.earlier.retain(|agent| found.contains(agent));
        others.running = found;
    }

    /// Removes the actions on a filter that belongs to an agent that started earlier. Returns true if this agent then
    /// has no program at the hook.
    ///
    /// All agents use the same names and handles for their filters, so two agents would replace each other's filter
    /// forever.
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
