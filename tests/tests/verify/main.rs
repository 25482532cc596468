//! `verify` passes on a protected node, fails for each possible reason, and leaves nothing behind.

mod hook_checks;
mod node_rules;
mod rights;
mod traces;

use std::process::Output;

use imds_tests::{Netns, Pod, PodLink, TestEnv};
use serde_json::Value;

const ALL: [&str; 3] = ["from_pod", "node_egress", "socket"];
/// Configuration with endpoints of both address families.
const AWS: &str = "provider = 'aws'";

/// Runs `verify` in the cgroup of the socket hook.
fn verify(env: &TestEnv) -> (Output, Value) {
    env.in_cgroup(|| verify_here(env))
}

fn verify_here(env: &TestEnv) -> (Output, Value) {
    let output = env.imds_agent(&["verify", "-o", "json"]).output();
    let report = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
    assert_nothing_left(env);
    (output, report)
}

fn interfaces(netns: &Netns) -> Vec<String> {
    netns.run(|| {
        let interfaces = nix::net::if_::if_nameindex().unwrap();
        interfaces.iter().map(|interface| interface.name().to_string_lossy().into_owned()).collect()
    })
}

#[track_caller]
fn assert_nothing_left(env: &TestEnv) {
    let left = interfaces(&env.node).into_iter().find(|name| name.starts_with("imdsv"));
    assert_eq!(left, None);
}

fn all_checks(report: &Value) -> impl Iterator<Item = &Value> {
    report["checks"].as_array().unwrap_or_else(|| panic!("{report:#}")).iter()
}

fn checks<'a>(report: &'a Value, hook: &str) -> Vec<&'a Value> {
    all_checks(report).filter(|check| check["hook"] == hook).collect()
}

/// Returns outcome and observation of a sender's packets along their path through the node, for each endpoint.
fn path_of(report: &Value, sender: &str) -> Vec<(String, String)> {
    let text = |check: &Value, field: &str| check[field].as_str().unwrap().to_owned();
    let path = checks(report, "path").into_iter().filter(|check| check["sender"] == sender);
    path.map(|check| (text(check, "outcome"), text(check, "observed"))).collect()
}

/// Returns the hooks with a check of this outcome.
fn hooks_with<'a>(report: &'a Value, outcome: &str) -> Vec<&'a str> {
    let checks = all_checks(report).filter(|check| check["outcome"] == outcome);
    let mut hooks: Vec<_> = checks.filter_map(|check| check["hook"].as_str()).collect();
    hooks.dedup();
    hooks
}

#[track_caller]
fn assert_passed((output, report): &(Output, Value)) {
    assert_eq!(output.status.code(), Some(0), "{report:#}\n{output:?}");
    assert_eq!((report["schema"].as_u64(), report["passed"].as_bool()), (Some(1), Some(true)));
    assert!(hooks_with(report, "failed").is_empty());
}

#[track_caller]
fn assert_all_passed(verified: &(Output, Value)) {
    assert_passed(verified);
    assert_eq!(hooks_with(&verified.1, "skipped"), [""; 0], "{:#}", verified.1);
}

#[track_caller]
fn assert_fails((output, report): &(Output, Value), hooks: &[&str]) {
    assert_eq!(output.status.code(), Some(3), "{report:#}\n{output:?}");
    assert_eq!(report["passed"], false);
    assert_eq!(hooks_with(report, "failed"), hooks, "{report:#}");
}

/// Returns an exemption for this pod.
fn exempt(pod: &Pod) -> String {
    format!("[[exempt]]\nname = 'one'\ninterface = '{}'", pod.host_ifname)
}

/// Adds a pod of each kind. The bridged one is for an exemption.
fn add_pods(env: &TestEnv) -> (Pod, Pod) {
    (env.add_pod(PodLink::Routed), env.add_pod(PodLink::Bridged))
}
