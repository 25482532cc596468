//! `kubectl imds status`: the state of each node.

use std::{collections::BTreeMap, fmt::Write as _, process::ExitCode};

use anyhow::Result;
use serde::Serialize;

use super::{
    node_status::{self, NodeStatus, ONLY_BY_EXEC, Via},
    output::{Columns, Format, SCHEMA, count, errors_text, exit_code, names, print},
};
use crate::{
    escape::escape,
    fleet::{Fleet, NodeError},
};

/// Status of all nodes.
#[derive(Debug, Serialize)]
struct FleetStatus {
    schema: u32,
    summary: Summary,
    nodes: Vec<NodeRow>,
    errors: Vec<NodeError>,
    limitations: Vec<String>,
}

#[derive(Debug, Default, Serialize)]
struct Summary {
    nodes: usize,
    /// Nodes by state; `unknown` for those without an answer.
    by_state: BTreeMap<String, usize>,
}

#[derive(Debug, Serialize)]
struct NodeRow {
    node: String,
    pod: String,
    #[serde(flatten)]
    status: NodeStatus,
}

/// Prints the status of all nodes. The exit code is that of a failed check unless each node is healthy.
pub(crate) async fn status(fleet: &Fleet, via: Via, port: u16, format: Format) -> Result<ExitCode> {
    let mut nodes = Vec::new();
    let errors = fleet
        .ask(
            |target| node_status::ask(fleet, target, via, port),
            |target, status| {
                nodes.push(NodeRow { node: target.node.clone(), pod: target.pod.clone(), status });
            },
        )
        .await;
    let report = FleetStatus::new(nodes, errors, limitations(fleet, via));
    let is_healthy = report.is_healthy();
    print(format, &report, &report.limitations, FleetStatus::table)?;
    Ok(exit_code(is_healthy))
}

/// Returns the limitations of a result.
pub(super) fn limitations(fleet: &Fleet, via: Via) -> Vec<String> {
    let mut limitations = fleet.limitations.clone();
    if via == Via::Metrics {
        limitations.push(format!("metrics do not have {}", ONLY_BY_EXEC.join(", ")));
    }
    limitations
}

impl FleetStatus {
    fn new(mut nodes: Vec<NodeRow>, errors: Vec<NodeError>, limitations: Vec<String>) -> Self {
        nodes.sort_by(|a, b| a.node.cmp(&b.node));
        let mut summary = Summary { nodes: nodes.len() + errors.len(), ..Summary::default() };
        for row in &nodes {
            *summary.by_state.entry(row.status.state.clone()).or_default() += 1;
        }
        if !errors.is_empty() {
            summary.by_state.insert("unknown".to_owned(), errors.len());
        }
        Self { schema: SCHEMA, summary, nodes, errors, limitations }
    }

    fn is_healthy(&self) -> bool {
        self.errors.is_empty() && self.nodes.iter().all(|row| row.status.is_healthy())
    }

    fn table(&self) -> String {
        let mut columns =
            Columns::new(["NODE", "VERSION", "STATE", "MODE", "CONFIG", "READY", "ATTACHED", "PROBLEMS"]);
        let unknown = "-";
        let mut rows: Vec<(&str, [String; 7])> = Vec::new();
        for NodeRow { node, status, .. } in &self.nodes {
            let rejected = if status.config_rejected { " (newer rejected)" } else { "" };
            let config = status.config_hash.as_deref().unwrap_or(unknown);
            rows.push((
                node,
                [
                    status.version.clone(),
                    status.state.clone(),
                    status.mode.clone().unwrap_or_else(|| unknown.to_owned()),
                    format!("{config}{rejected}"),
                    if status.ready { "yes" } else { "no" }.to_owned(),
                    format!("{}/{}", status.attached, status.attachments),
                    status.problem_count.to_string(),
                ],
            ));
        }
        for error in &self.errors {
            let mut cells = [(); 7].map(|()| unknown.to_owned());
            "unknown".clone_into(&mut cells[1]);
            rows.push((&error.node, cells));
        }
        rows.sort_by_key(|(node, _)| *node);
        for (node, cells) in &rows {
            columns.add([*node].into_iter().chain(cells.iter().map(String::as_str)));
        }
        let states = self.summary.by_state.iter();
        let states: Vec<_> = states.map(|(state, nodes)| format!("{nodes} {}", escape(state))).collect();
        let total = count(self.summary.nodes, "node");
        let mut text = columns.finish();
        // Writing to a string does not fail.
        let _ok = writeln!(text, "\n{total}: {}", states.join(", "));
        text + &self.problems_text() + &errors_text(&self.errors)
    }

    /// Returns the problems of all nodes, each once with the nodes that have it.
    fn problems_text(&self) -> String {
        let mut by_problem = BTreeMap::<&str, Vec<&str>>::new();
        for NodeRow { node, status, .. } in &self.nodes {
            for problem in &status.problems {
                by_problem.entry(problem).or_default().push(node);
            }
        }
        let mut text = String::new();
        if !by_problem.is_empty() {
            text += "\nproblems:\n";
        }
        for (problem, nodes) in by_problem {
            let _ok = writeln!(text, "  {}: {}", escape(&names(&nodes)), escape(problem));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(node: &str, state: &str) -> NodeRow {
        let problems =
            if state == "degraded" { vec!["no agent is running\nforged".to_owned()] } else { Vec::new() };
        let status = NodeStatus {
            version: "0.1.0".to_owned(),
            state: state.to_owned(),
            ready: true,
            mode: Some("enforce".to_owned()),
            config_hash: Some("0123456789ab".to_owned()),
            attached: 3,
            attachments: 3,
            problem_count: problems.len(),
            problems,
            ..NodeStatus::default()
        };
        NodeRow { node: node.to_owned(), pod: "p".to_owned(), status }
    }

    #[test]
    fn table_has_a_row_for_each_node() {
        let error = NodeError { node: "b".to_owned(), pod: None, error: "no answer within 30s".to_owned() };
        let nodes = vec![row("c", "degraded"), row("a", "enforcing")];
        let report = FleetStatus::new(nodes, vec![error], Vec::new());
        assert!(!report.is_healthy());
        let expected = " NODE  VERSION  STATE      MODE     CONFIG        READY  ATTACHED  PROBLEMS
 a     0.1.0    enforcing  enforce  0123456789ab  yes    3/3       0
 b     -        unknown    -        -             -      -         -
 c     0.1.0    degraded   enforce  0123456789ab  yes    3/3       1

3 nodes: 1 degraded, 1 enforcing, 1 unknown

problems:
  c: no agent is running\\nforged

without an answer:
  b: no answer within 30s
";
        assert_eq!(report.table(), expected);
    }

    #[test]
    fn node_without_an_answer_is_not_healthy() {
        assert!(FleetStatus::new(vec![row("a", "enforcing")], Vec::new(), Vec::new()).is_healthy());
        let error = NodeError { node: "b".to_owned(), pod: None, error: "e".to_owned() };
        assert!(!FleetStatus::new(vec![row("a", "enforcing")], vec![error], Vec::new()).is_healthy());
    }
}
