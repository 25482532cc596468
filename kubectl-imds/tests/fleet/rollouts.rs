//! `rollout status`: revisions, readiness and configurations.

use std::time::Duration;

use imds_tests::api_server::agent_pod;
use serde_json::{Value, json};

use super::{Cluster, pod, status};

const HASH: &str = "controller-revision-hash";

/// Sets a `DaemonSet` whose newest revision is `new`, and its pods, each with its revision.
fn set_pods(cluster: &Cluster, pods: &[(&str, &str)]) {
    let owner = json!([{ "kind": "DaemonSet", "name": "imds-agent", "uid": "set" }]);
    let apps = "/apis/apps/v1/namespaces/imds-agent";
    let set = json!({
        "metadata": { "name": "imds-agent", "uid": "set", "generation": 2 },
        "status": { "observedGeneration": 2, "desiredNumberScheduled": pods.len() },
    });
    cluster.server.set_list(&format!("{apps}/daemonsets"), vec![set]);
    let revision = |(number, name): (i32, &str)| -> Value {
        json!({
            "metadata": { "name": name, "labels": { HASH: name }, "ownerReferences": owner },
            "revision": number,
        })
    };
    let revisions = [(1, "old"), (2, "new")].map(revision).to_vec();
    cluster.server.set_list(&format!("{apps}/controllerrevisions"), revisions);
    let pods = pods.iter().map(|(node, revision)| {
        let mut object = agent_pod(&pod(node), node);
        object["metadata"]["labels"][HASH] = json!(revision);
        object["metadata"]["ownerReferences"] = owner.clone();
        object
    });
    cluster.server.set_agent_pods(pods.collect());
}

#[test]
fn rollout_is_complete_when_all_nodes_agree() {
    let cluster = Cluster::new(&["n1", "n2"]);
    set_pods(&cluster, &[("n1", "new"), ("n2", "new")]);
    let (stdout, _) = cluster.run("rollout status --timeout 1s", 0);
    assert_eq!(stdout, "rollout complete: 2 nodes have the newest revision and one configuration\n");
    set_pods(&cluster, &[("n1", "new"), ("n2", "old")]);
    let (stdout, _) = cluster.run("rollout status --timeout 1s", 3);
    assert!(stdout.contains("1 pod of an earlier revision on n2"), "{stdout}");
    set_pods(&cluster, &[("n1", "new"), ("n2", "new")]);
    let rejected = json!({ "generation": 1, "hash": "00000000000000a1", "rejected": { "error": "e" } });
    cluster.answers("n2", &[("status", &status(&json!({ "configuration": rejected })), 3)]);
    let json = cluster.json("rollout status --timeout 1s", 3);
    assert_eq!(json["waiting"], json!(["configuration rejected on n2"]));
    let other = json!({ "generation": 1, "hash": "00000000000000a2", "rejected": null });
    cluster.answers("n2", &[("status", &status(&json!({ "configuration": other })), 0)]);
    let (stdout, _) = cluster.run("rollout status --timeout 1s", 3);
    assert!(stdout.contains("configurations differ: 0000000000a1 on n1, 0000000000a2 on n2"), "{stdout}");
}

#[test]
fn rollout_is_waited_for() {
    let cluster = Cluster::new(&["n1", "n2"]);
    set_pods(&cluster, &[("n1", "new"), ("n2", "old")]);
    let output = std::thread::scope(|scope| {
        let command = scope.spawn(|| cluster.run("rollout status --timeout 20s", 0));
        imds_tests::poll::poll_until(Duration::from_secs(20), "the first list of revisions", || {
            cluster.server.requests().iter().any(|target| target.contains("revisions?")).then_some(())
        });
        set_pods(&cluster, &[("n1", "new"), ("n2", "new")]);
        command.join().unwrap()
    });
    assert!(output.0.starts_with("rollout complete"), "{output:?}");
}

#[test]
fn silent_node_is_not_rolled_out() {
    let cluster = Cluster::new(&["n1"]);
    set_pods(&cluster, &[("n1", "new")]);
    cluster.server.on_exec(&pod("n1"), imds_tests::api_server::Exec::Close(""));
    let (stdout, _) = cluster.run("rollout status --timeout 1s", 3);
    assert!(stdout.contains("n1: the connection to the pod ended"), "{stdout}");
}
