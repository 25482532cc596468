//! Counters of the running agent.

use crate::{kube::WatchState, telemetry::pod_events::EventWrites};

/// Counters of a running agent since its start.
#[derive(Clone, Debug, Default)]
pub struct AgentStats {
    pub reloads: Reloads,
    pub corrections: DriftCorrections,
    pub map_updates: MapUpdates,
    pub watch: Option<WatchState>,
    /// Writes of Kubernetes Events; `None` if they are off.
    pub event_writes: Option<EventWrites>,
    /// State of the namespace watch, if a rule needs one.
    pub namespace_watch: Option<WatchState>,
    /// Requests that the broker has answered, and its restarts.
    pub broker: BrokerStats,
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

/// Numbers of requests by pods with a scoped exemption, and of restarts of the broker.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct BrokerStats {
    /// Requests that the broker forwarded.
    pub allowed: u64,
    /// Requests that the broker refused.
    pub refused: u64,
    /// Requests that the broker could not forward, or whose response it could not.
    pub failed: u64,
    pub restarts: u64,
}

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct MapUpdates {
    pub exemptions: u64,
    pub pods: u64,
}

impl DriftCorrections {
    /// Describes the corrections since `earlier`, or returns `None` without any.
    pub fn describe_since(&self, earlier: &Self) -> Option<String> {
        let counts = [
            (self.attached, earlier.attached, "attached again"),
            (self.replaced, earlier.replaced, "replaced"),
            (self.pinned, earlier.pinned, "pinned again"),
            (self.reordered, earlier.reordered, "moved to the head of their hook"),
            (self.postponed, earlier.postponed, "postponed, because another program undoes them repeatedly"),
        ];
        let changes = counts.into_iter().filter(|(now, before, _)| now > before);
        let texts: Vec<_> =
            changes.map(|(now, before, action)| format!("{} {action}", now.saturating_sub(before))).collect();
        (!texts.is_empty()).then(|| texts.join(", "))
    }
}
