//! `kubectl imds verify`: sends test packets on each node.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    process::ExitCode,
};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::output::{Columns, Format, SCHEMA, count, errors_text, exit_code, names, print};
use crate::{
    escape::escape,
    fleet::{AskError, Fleet, NodeError, Target, check_schema},
};

/// Skipped checks of a node whose reasons are kept.
const MAX_REASONS: usize = 100;

/// Output of `imds-agent verify -o json`: see docs/json.md.
#[derive(Debug, Deserialize)]
struct VerifyDocument {
    schema: u64,
    mode: String,
    passed: bool,
    checks: Vec<Check>,
}

#[derive(Debug, Deserialize, Serialize)]
struct Check {
    hook: String,
    sender: Option<String>,
    endpoint: Option<String>,
    address: Option<String>,
    service: Option<String>,
    expected: String,
    observed: String,
    outcome: String,
}

/// Results of all nodes.
#[derive(Debug, Serialize)]
struct FleetVerification {
    schema: u32,
    nodes: Vec<NodeResult>,
    errors: Vec<NodeError>,
    limitations: Vec<String>,
}

#[derive(Debug, Serialize)]
struct NodeResult {
    node: String,
    mode: String,
    passed: bool,
    passed_checks: usize,
    skipped_checks: usize,
    /// Reasons of the skipped checks, each once.
    skip_reasons: BTreeSet<String>,
    failed: Vec<Check>,
}

/// Runs the checks on all nodes. The exit code is that of a failed check unless all passed.
pub(crate) async fn verify(fleet: &Fleet, format: Format) -> Result<ExitCode> {
    let mut nodes = Vec::new();
    let errors = fleet
        .ask(
            async |target| {
                let document: VerifyDocument = fleet.json(target, &["verify", "-o", "json"]).await?;
                check_schema(document.schema)?;
                Ok::<_, AskError>(document)
            },
            |target, document| nodes.push(NodeResult::new(target, document)),
        )
        .await;
    let report = FleetVerification::new(nodes, errors, fleet.limitations.clone());
    print(format, &report, &report.limitations, FleetVerification::table)?;
    Ok(exit_code(report.has_passed()))
}

impl NodeResult {
    fn new(target: &Target, VerifyDocument { mode, passed, checks, .. }: VerifyDocument) -> Self {
        let number = |outcome: &str| checks.iter().filter(|check| check.outcome == outcome).count();
        let (passed_checks, skipped_checks) = (number("passed"), number("skipped"));
        let skipped = checks.iter().filter(|check| check.outcome == "skipped").take(MAX_REASONS);
        let skip_reasons = skipped.map(|check| check.observed.clone()).collect();
        let is_failed = |check: &Check| !["passed", "skipped"].contains(&&*check.outcome);
        let failed: Vec<_> = checks.into_iter().filter(is_failed).collect();
        // The node's own summary alone is not believed.
        let passed = passed && failed.is_empty() && passed_checks > 0;
        Self { node: target.node.clone(), mode, passed, passed_checks, skipped_checks, skip_reasons, failed }
    }
}

impl FleetVerification {
    fn new(mut nodes: Vec<NodeResult>, errors: Vec<NodeError>, limitations: Vec<String>) -> Self {
        nodes.sort_by(|a, b| a.node.cmp(&b.node));
        Self { schema: SCHEMA, nodes, errors, limitations }
    }

    fn has_passed(&self) -> bool {
        self.errors.is_empty() && self.nodes.iter().all(|node| node.passed)
    }

    fn table(&self) -> String {
        let mut columns =
            Columns::new(["NODE", "HOOK", "SENDER", "ENDPOINT", "ADDRESS", "EXPECTED", "OBSERVED"]);
        for result in self.nodes.iter().filter(|result| !result.passed) {
            let text = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
            for check in &result.failed {
                let service = check.service.as_ref().map(|service| format!(" {service}")).unwrap_or_default();
                columns.add([
                    result.node.clone(),
                    check.hook.clone(),
                    text(&check.sender),
                    text(&check.endpoint),
                    text(&check.address) + &service,
                    check.expected.clone(),
                    check.observed.clone(),
                ]);
            }
            if result.failed.is_empty() {
                let observed = format!("none passed, {} skipped", result.skipped_checks);
                let mut cells = [result.node.as_str(), "-", "-", "-", "-", "a check passes", ""];
                if let Some(last) = cells.last_mut() {
                    *last = &observed;
                }
                columns.add(cells);
            }
        }
        let mut text = columns.finish();
        if !text.is_empty() {
            text.push('\n');
        }
        let passed = self.nodes.iter().filter(|node| node.passed).count();
        let total = count(self.nodes.len() + self.errors.len(), "node");
        let (failed, silent) = (self.nodes.len() - passed, self.errors.len());
        // Writing to a string does not fail.
        let _ok = writeln!(text, "{total}: {passed} passed, {failed} failed, {silent} without an answer");
        let audits: Vec<_> = self.nodes.iter().filter(|node| node.mode != "enforce").collect();
        if !audits.is_empty() {
            let _ok = writeln!(text, "{} not in mode enforce", count(audits.len(), "node"));
        }
        text + &self.skipped_text() + &errors_text(&self.errors)
    }

    /// Returns the reasons of skipped checks, each with its nodes: what is skipped is not known to be enforced.
    fn skipped_text(&self) -> String {
        let mut by_reason = BTreeMap::<&str, Vec<&str>>::new();
        for NodeResult { node, skip_reasons, .. } in &self.nodes {
            for reason in skip_reasons {
                by_reason.entry(reason).or_default().push(node);
            }
        }
        let mut text = String::new();
        if !by_reason.is_empty() {
            text += "\nskipped checks:\n";
        }
        for (reason, nodes) in by_reason {
            let _ok = writeln!(text, "  {}: {}", escape(&names(&nodes)), escape(reason));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn result(node: &str, passed: bool, outcomes: &[&str]) -> NodeResult {
        let check = |outcome: &&str| -> Value {
            json!({
                "hook": "from_pod", "sender": "pod", "endpoint": "imds", "address": "169.254.169.254",
                "service": null, "expected": "denied", "observed": "not denied", "outcome": outcome,
            })
        };
        let checks: Vec<_> = outcomes.iter().map(check).collect();
        let document = json!({ "schema": 1, "mode": "enforce", "passed": passed, "checks": checks });
        let target = Target { node: node.to_owned(), pod: "p".to_owned(), uid: "u".to_owned() };
        NodeResult::new(&target, serde_json::from_value(document).unwrap())
    }

    #[test]
    fn only_failed_checks_are_listed() {
        let nodes =
            vec![result("b", false, &["passed", "failed"]), result("a", true, &["passed", "skipped"])];
        let report = FleetVerification::new(nodes, Vec::new(), Vec::new());
        let expected = " NODE  HOOK      SENDER  ENDPOINT  ADDRESS          EXPECTED  OBSERVED
 b     from_pod  pod     imds      169.254.169.254  denied    not denied

2 nodes: 1 passed, 1 failed, 0 without an answer

skipped checks:
  a: not denied
";
        assert_eq!(report.table(), expected);
        assert!(!report.has_passed());
    }

    #[test]
    fn summary_of_a_node_is_not_believed() {
        assert!(result("a", true, &["passed"]).passed);
        for outcomes in [&["failed"][..], &["skipped"], &[], &["passed", "other"]] {
            assert!(!result("a", true, outcomes).passed, "{outcomes:?}");
        }
    }
}
