//! Time until `from_pod` is attached to new links, measured from the agent's log.

use std::{collections::BTreeMap, time::Duration};

use imds_tests::{Agent, measure::Samples, poll::poll_until};

use crate::link_churn::MadeLink;

/// Log line of an attachment, up to the interface name.
const ATTACHED: &str = "attached from_pod to ";

/// Milliseconds from the first event of each link to the log line of its attachment. Links that were deleted before
/// their turn in the attach queue have none.
pub(crate) fn latencies(agent: &Agent<'_>, made: &[MadeLink]) -> Samples {
    let by_name: BTreeMap<&str, &MadeLink> = made.iter().map(|link| (link.name.as_str(), link)).collect();
    poll_until(Duration::from_secs(5), "the agent to log the last deletion", || {
        let last = made.last().map(|link| format!("{} ", link.name))?;
        agent
            .log_lines()
            .iter()
            .any(|(_, line)| line.contains(&last) && line.contains("deleted"))
            .then_some(())
    });
    let lines = agent.log_lines();
    let latencies = lines.iter().filter_map(|(time, line)| {
        let (_, rest) = line.split_once(ATTACHED)?;
        let link = by_name.get(rest.split_once(' ')?.0)?;
        Some(time.saturating_duration_since(link.announced).as_secs_f64() * 1e3)
    });
    Samples::new(latencies)
}
