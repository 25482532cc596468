//! The plugin against an API server whose pods answer from tables, and against a real agent.

mod failures;
mod real_agent;
mod reports;
mod rollouts;
mod scale;
mod selection;
mod streams;

use std::{
    process::{Command, Output},
    sync::Arc,
};

use imds_tests::api_server::{ApiServer, Exec, ExecOutput, agent_pod, node};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A cluster of nodes that answer from tables.
struct Cluster {
    server: ApiServer,
    directory: TempDir,
}

impl Cluster {
    /// Creates a cluster whose nodes each have a running agent.
    fn new(nodes: &[&str]) -> Self {
        let directory = TempDir::new().unwrap();
        let server = ApiServer::start();
        server.write_kubeconfig(&directory.path().join("kubeconfig"));
        let cluster = Self { server, directory };
        cluster.server.set_list("/api/v1/nodes", nodes.iter().map(|name| node(name, "a")).collect());
        cluster.server.set_agent_pods(nodes.iter().map(|name| agent_pod(&pod(name), name)).collect());
        for name in nodes {
            cluster.answers(name, &[("status", &status(&json!({})), 0)]);
        }
        cluster
    }

    /// Sets the outputs of the agent on a node, each with an exit code.
    fn answers(&self, node: &str, outputs: &[(&'static str, &Value, i32)]) {
        let outputs: Vec<_> =
            outputs.iter().map(|&(command, output, code)| (command, output.to_string(), code)).collect();
        let answer = move |command: &[String]| {
            assert_eq!(command[0], "/imds-agent");
            let command = command[1..].join(" ");
            let found = outputs.iter().find(|(start, ..)| command.starts_with(start));
            let (_, stdout, code) = found.unwrap_or_else(|| panic!("no answer to {command}"));
            ExecOutput { stdout: stdout.clone(), code: *code, ..ExecOutput::default() }
        };
        self.server.on_exec(&pod(node), Exec::Answer(Arc::new(answer)));
    }

    /// Returns the plugin with these arguments.
    fn command(&self, arguments: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kubectl-imds"));
        command.args(arguments.split_whitespace());
        command.env("KUBECONFIG", self.directory.path().join("kubeconfig"));
        command
    }

    /// Runs the plugin and asserts its exit code.
    #[track_caller]
    fn run(&self, arguments: &str, code: i32) -> (String, String) {
        let output = imds_tests::output(self.command(arguments));
        let (stdout, stderr) = texts(&output);
        assert_eq!(output.status.code(), Some(code), "{arguments}:\n{stdout}\n{stderr}");
        (stdout, stderr)
    }

    /// Runs the plugin with JSON output and asserts its exit code.
    #[track_caller]
    fn json(&self, arguments: &str, code: i32) -> Value {
        let (stdout, _) = self.run(&format!("{arguments} -o json"), code);
        serde_json::from_str(&stdout).unwrap_or_else(|error| panic!("{error}: {stdout}"))
    }
}

fn texts(Output { stdout, stderr, .. }: &Output) -> (String, String) {
    (String::from_utf8_lossy(stdout).into_owned(), String::from_utf8_lossy(stderr).into_owned())
}

/// Name of the agent's pod on a node.
fn pod(node: &str) -> String {
    format!("imds-agent-{node}")
}

/// Output of `imds-agent status -o json` of a node without problems, with other values of some fields.
fn status(changes: &Value) -> Value {
    let mut status = json!({
        "schema": 1, "version": "0.1.0", "state": "enforcing",
        "agent": { "running": true, "ready": true, "pid": 1 },
        "configuration": {
            "generation": 1, "hash": "00000000000000a1", "file": null, "loaded_at": "2026-11-23T15:04:05Z",
            "rejected": null,
        },
        "mode": "enforce", "on_deny": "drop", "provider": { "configured": "auto", "effective": "azure" },
        "endpoints": [{ "name": "imds", "address": "169.254.169.254", "allow_ports": [] }],
        "exemptions": [], "kubernetes": null, "hooks": ["from_pod"],
        "interfaces": [{ "attachments": [{ "hook": "from_pod", "attach_mode": "tcx", "order": "first" }] }],
        "sockets": null, "host_network": null, "local_service": null, "node_allow": null, "problems": [],
    });
    for (name, value) in changes.as_object().unwrap() {
        status[name] = value.clone();
    }
    status
}

#[test]
fn status_has_a_row_for_each_node() {
    let cluster = Cluster::new(&["n1", "n2", "n3", "n4"]);
    let problem = json!([{ "interface": "veth0", "problem": "not\u{1b}[2J first", "remedy": "r" }]);
    let degraded = status(&json!({ "state": "degraded", "problems": problem }));
    cluster.answers("n2", &[("status -o json", &degraded, 3)]);
    let mut pending = agent_pod("imds-agent-n3", "n3");
    pending["status"]["phase"] = json!("Pending");
    let pods = ["n1", "n2"].map(|node| agent_pod(&pod(node), node)).into_iter();
    cluster.server.set_agent_pods(pods.chain([pending]).collect());
    let (stdout, stderr) = cluster.run("status", 3);
    let expected = r" NODE  VERSION  STATE      MODE     CONFIG        READY  ATTACHED  PROBLEMS
 n1    0.1.0    enforcing  enforce  0000000000a1  yes    1/1       0
 n2    0.1.0    degraded   enforce  0000000000a1  yes    1/1       1
 n3    -        unknown    -        -             -      -         -
 n4    -        unknown    -        -             -      -         -

4 nodes: 1 degraded, 1 enforcing, 2 unknown

problems:
  n2: veth0: not\u{1b}[2J first

without an answer:
  n4: no pod of the agent is on this node
  n3: pod imds-agent-n3 is pending
";
    assert_eq!((&*stdout, &*stderr), (expected, ""));
    let report = cluster.json("status", 3);
    assert_eq!((&report["schema"], &report["summary"]["by_state"]["unknown"]), (&json!(1), &json!(2)));
    assert_eq!(report["nodes"][0]["node"], "n1");
    assert_eq!(report["errors"].as_array().unwrap().len(), 2);
}

#[test]
fn healthy_fleet_has_exit_code_0() {
    let cluster = Cluster::new(&["n1", "n2"]);
    let (stdout, _) = cluster.run("status", 0);
    assert!(stdout.contains("2 nodes: 2 enforcing\n"), "{stdout}");
    cluster.answers("n2", &[("status", &status(&json!({ "agent": { "ready": false } })), 0)]);
    cluster.run("status", 3);
}

#[test]
fn compare_lists_what_differs() {
    let cluster = Cluster::new(&["n1", "n2", "n3"]);
    let (stdout, _) = cluster.run("compare", 0);
    assert!(stdout.starts_with("all of 3 nodes are equal:\n"), "{stdout}");
    let other = status(&json!({ "mode": "audit", "state": "auditing" }));
    cluster.answers("n3", &[("status", &other, 0)]);
    let report = cluster.json("compare", 3);
    assert_eq!(report["groups"][0]["nodes"], json!(["n1", "n2"]));
    assert_eq!(report["groups"][1]["differences"], json!(["mode", "state"]));
    let (stdout, _) = cluster.run("compare", 3);
    assert!(stdout.contains(" n3     mode        audit     enforce\n"), "{stdout}");
}

#[test]
fn metrics_replace_exec() {
    let cluster = Cluster::new(&["n1", "n2"]);
    cluster.server.forbid("/api/v1/namespaces/imds-agent/pods/imds-agent-n1/exec");
    cluster.server.forbid("/api/v1/namespaces/imds-agent/pods/imds-agent-n2/exec");
    let metrics = "imds_agent_build_info{version=\"0.1.0\"} 1\nimds_agent_mode{mode=\"enforce\"} 1
imds_agent_ready 1\nimds_agent_problems 0\nimds_agent_config_hash 161\n";
    cluster.server.set_metrics(&pod("n1"), metrics);
    let (stdout, _) = cluster.run("status", 3);
    assert!(stdout.contains("\n  n1, n2: no permission: forbidden"), "{stdout}");
    let (stdout, stderr) = cluster.run("status --via metrics", 3);
    assert!(stdout.contains(" n1    0.1.0    enforcing  enforce  0000000000a1  yes"), "{stdout}");
    assert!(stdout.contains("n2: error trying to reach service"), "{stdout}");
    assert!(stderr.contains("metrics do not have on_deny, provider"), "{stderr}");
    cluster.server.set_metrics(&pod("n2"), &metrics.replace("161", "162"));
    let report = cluster.json("compare --via metrics", 3);
    assert_eq!(report["groups"][1]["differences"], json!(["config_hash"]));
}
