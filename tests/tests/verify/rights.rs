//! `verify` with the capabilities of the shipped `DaemonSet`.

use imds_tests::{PodLink, TestEnv, daemon_set, output, skip_without_netns_cookie};
use serde_json::Value;

use crate::{ALL, assert_nothing_left, hooks_with, path_of};

#[test]
fn daemonset_capabilities() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let _pod = env.add_pod(PodLink::Routed);
    let _agent = env.agent().hooks(&ALL).spawn_ready();
    let command = env.imds_agent(&["verify", "-o", "json"]).command();
    let granted = daemon_set::capabilities().join(",+").to_lowercase();
    let mut limited = env.node.command("setpriv");
    limited
        .arg(format!("--bounding-set=-all,+{granted}"))
        .arg(command.get_program())
        .args(command.get_args());
    let output = env.in_cgroup(|| output(limited));
    assert_nothing_left(&env);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"));
    assert_eq!(output.status.code(), Some(0), "{report:#}");
    assert_eq!(hooks_with(&report, "failed"), [""; 0]);
    let (outcome, observed) = &path_of(&report, "exempt pod")[0];
    assert!(outcome == "skipped" && observed.contains("CAP_NET_RAW"), "{observed}");
    assert_eq!(path_of(&report, "node")[0].0, "passed", "{report:#}");
    assert!(hooks_with(&report, "passed").contains(&"socket"), "{report:#}");
}
