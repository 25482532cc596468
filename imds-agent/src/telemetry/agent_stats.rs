//! Counters of the running agent.

use crate::kube::WatchState;

/// Counters of a running agent since its start.
#[derive(Clone, Debug, Default)]
pub struct AgentStats {
    pub reloads: Reloads,
    pub corrections: DriftCorrections,
    pub map_updates: MapUpdates,
    pub watch: Option<WatchState>,
    /// Log lines that were dropped, because standard error was not read.
    pub log_lines_dropped: u64,
}

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Reloads {
    /// Reloads whose configuration became effective.
    pub succeeded: u64,
    /// Reloads whose configuration was rejected.
    pub failed: u64,
}

/// Numbers of drift corrections since the agent started: changes of other programs that the agent reverted.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct DriftCorrections {
    pub attached: u64,
    /// Programs of others that this agent's program replaced.
    pub replaced: u64,
    /// Links pinned again, and entries of the pin directory restored.
    pub pinned: u64,
    /// Programs moved to the head of their hook, because another program had been attached before them.
    pub reordered: u64,
    /// Repairs that were postponed because another program undid them repeatedly.
    pub postponed: u64,
    /// Overruns of the netlink receive buffer (ENOBUFS).
    pub overruns: u64,
}

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct MapUpdates {
    pub exemptions: u64,
    pub pods: u64,
}
