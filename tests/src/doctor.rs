//! The report of `imds-agent doctor`.

use std::process::Output;

use serde_json::Value;

use crate::{AgentCommand, TestEnv};

/// Returns the report of the node.
#[track_caller]
pub fn doctor_report(env: &TestEnv) -> Value {
    report(&command(env).output())
}

/// Returns the command that prints the report.
pub fn command(env: &TestEnv) -> AgentCommand<'_> {
    env.imds_agent(&["doctor", "-o", "json"])
}

/// Reads the report from the output of the command.
#[track_caller]
pub fn report(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

/// Returns the checks with this name.
#[track_caller]
pub fn all<'a>(report: &'a Value, name: &str) -> Vec<&'a Value> {
    report["checks"].as_array().unwrap().iter().filter(|check| check["name"] == name).collect()
}

/// Returns the only check with this name.
#[track_caller]
pub fn one<'a>(report: &'a Value, name: &str) -> &'a Value {
    let [check] = all(report, name)[..] else { panic!("{name}: {report:#}") };
    check
}

/// Asserts that a text of a check contains `part`.
#[track_caller]
pub fn assert_has(check: &Value, key: &str, part: &str) {
    assert!(check[key].as_str().is_some_and(|text| text.contains(part)), "{part}: {check:#}");
}
