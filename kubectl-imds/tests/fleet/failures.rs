//! Permissions that are missing, and nodes that do not answer.

use std::{
    process::Stdio,
    time::{Duration, Instant},
};

use imds_tests::api_server::{Exec, ExecOutput};
use serde_json::json;

use super::{Cluster, pod, texts};

#[test]
fn silent_nodes_do_not_hide_others() {
    let cluster = Cluster::new(&["ok", "silent", "gone", "endless", "failed", "old", "garbage"]);
    cluster.server.on_exec(&pod("silent"), Exec::Silent);
    cluster.server.on_exec(&pod("gone"), Exec::Close("{\"schema\""));
    cluster.server.on_exec(&pod("endless"), Exec::Endless);
    let failed = ExecOutput {
        stderr: "a warning\nimds-agent: missing capability \u{1b}[2J\n".to_owned(),
        code: 1,
        ..ExecOutput::default()
    };
    cluster.server.on_exec(&pod("failed"), Exec::Answer(std::sync::Arc::new(move |_| failed.clone())));
    cluster.answers("old", &[("status", &super::status(&json!({ "schema": 2 })), 0)]);
    cluster.answers("garbage", &[("status", &json!([1]), 0)]);
    let start = Instant::now();
    // The endless output must reach its limit before.
    let report = cluster.json("status --request-timeout 8s", 3);
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    assert_eq!(report["nodes"].as_array().unwrap().len(), 1);
    let error = |node: &str| {
        let errors = report["errors"].as_array().unwrap();
        let found = errors.iter().find(|error| error["node"] == node).unwrap();
        found["error"].as_str().unwrap().to_owned()
    };
    assert_eq!(error("silent"), "no answer within 8s");
    assert_eq!(error("gone"), "the connection to the pod ended before its command did");
    assert_eq!(error("endless"), "the output is longer than 8388608 bytes");
    assert_eq!(error("failed"), r"imds-agent: missing capability \u{1b}[2J (exit code 1)");
    assert_eq!(error("old"), "the agent's output has schema 2, this plugin reads 1");
    assert!(error("garbage").starts_with("failed to read the output: "), "{}", error("garbage"));
}

#[test]
fn missing_permissions_are_reported() {
    let cluster = Cluster::new(&["n1", "n2"]);
    cluster.server.forbid("/api/v1/nodes");
    let (stdout, stderr) = cluster.run("status", 0);
    assert!(stdout.contains("2 nodes: 2 enforcing"), "{stdout}");
    assert!(stderr.contains("nodes without an agent are not shown: no permission: "), "{stderr}");
    let (_, stderr) = cluster.run("status --node-selector pool=a", 1);
    assert!(stderr.contains("failed to list the nodes: no permission: "), "{stderr}");
    cluster.server.forbid("/api/v1/namespaces/");
    let (_, stderr) = cluster.run("status", 1);
    assert!(stderr.contains("failed to list the pods of namespace imds-agent: no permission: "), "{stderr}");
}

#[test]
fn unusable_cluster_is_one_error() {
    let cluster = Cluster::new(&["n1"]);
    let (_, stderr) = cluster.run("status --kubeconfig /no/such/file", 1);
    assert!(stderr.starts_with("kubectl-imds: failed to read the kubeconfig: "), "{stderr}");
    let (_, stderr) = cluster.run("status --context other", 1);
    assert!(stderr.starts_with("kubectl-imds: failed to read the kubeconfig: "), "{stderr}");
    let (_, stderr) = cluster.run("status --no-such-option", 2);
    assert!(stderr.contains("unexpected argument"), "{stderr}");
}

#[test]
fn interrupt_ends_the_command_at_once() {
    let cluster = Cluster::new(&["n1"]);
    cluster.server.on_exec(&pod("n1"), Exec::Silent);
    let mut command = cluster.command("status");
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    imds_tests::poll::poll_until(Duration::from_secs(20), "the exec request", || {
        cluster.server.requests().iter().any(|target| target.contains("/exec?")).then_some(())
    });
    let start = Instant::now();
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(child.id().cast_signed()),
        nix::sys::signal::Signal::SIGINT,
    )
    .unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    assert_eq!(output.status.code(), Some(130));
    assert_eq!(texts(&output), (String::new(), "kubectl-imds: interrupted\n".to_owned()));
}
