//! `[[node_pool]]`: settings of some nodes of a cluster, chosen by the node's labels and name.

use std::process::Command;

use imds_tests::{
    AgentCommand, METADATA, Pod, PodLink, TestCluster, output,
    poll::poll_until,
    probe::{LONG, http_get},
};
use serde_json::json;

const NODE: &str = TestCluster::NODE;
const POOLS: &str = "
    mode = 'audit'
    [[node_pool]]
    name = 'production'
    node_selector = { match_labels = { tier = 'production' } }
    mode = 'enforce'
    [[node_pool]]
    name = 'test'
    node_selector = { match_expressions = [{ key = 'tier', operator = 'In', values = ['test'] }] }
    mode = 'off'";

fn command(cluster: &TestCluster) -> AgentCommand<'_> {
    cluster.env.agent().config(&cluster.config(POOLS)).hooks(&["from_pod", "node_egress"])
}

fn wait_pool(cluster: &TestCluster, pool: Option<&str>, mode: &str) {
    cluster.env.status_when(&format!("the pool {pool:?} is effective"), |status| {
        let effective = status.configuration.as_ref().and_then(|config| config.node_pool.as_deref());
        effective == pool && status.mode.as_deref() == Some(mode)
    });
}

fn reaches(pod: &Pod) -> bool {
    http_get(&pod.netns, METADATA, LONG).is_answer()
}

#[test]
fn labels_choose_the_pool() {
    let cluster = TestCluster::new();
    let pod = cluster.env.add_pod(PodLink::Routed);
    cluster.server.set_labels(NODE, json!({ "tier": "production" }));
    let agent = command(&cluster).spawn_ready();
    wait_pool(&cluster, Some("production"), "enforce");
    cluster.env.assert_blocked(&pod);

    cluster.server.set_labels(NODE, json!({}));
    agent.hang_up();
    wait_pool(&cluster, None, "audit");
    assert!(reaches(&pod));

    cluster.server.set_labels(NODE, json!({ "tier": "production" }));
    agent.hang_up();
    wait_pool(&cluster, Some("production"), "enforce");
    cluster.env.assert_blocked(&pod);
}

#[test]
fn unknown_labels_enforce() {
    let cluster = TestCluster::new();
    cluster.server.forbid("/api/v1/nodes/");
    let pod = cluster.env.add_pod(PodLink::Routed);
    let agent = command(&cluster).spawn_ready();
    wait_pool(&cluster, None, "enforce");
    cluster.env.assert_blocked(&pod);
    agent.wait_for_log("failed to read the labels of node node-0, which choose its node_pool", LONG);
    // The answer of the API server decides later.
    cluster.server.set_labels(NODE, json!({ "tier": "test" }));
    cluster.server.permit_all();
    agent.hang_up();
    wait_pool(&cluster, Some("test"), "off");
    assert!(reaches(&pod));
    // The next agent keeps the pool while the labels are unknown.
    drop(agent);
    cluster.server.forbid("/api/v1/nodes/");
    let _agent = command(&cluster).spawn_ready();
    wait_pool(&cluster, Some("test"), "off");
}

#[test]
fn labels_choose_from_the_last_good_file() {
    let cluster = TestCluster::new();
    let file = cluster.env.scratch_dir().join("imds.toml");
    let good = cluster.config(&format!("{POOLS}\n[hooks]\nsocket = false\nlocal_service = false"));
    std::fs::write(&file, &good).expect("write a configuration");
    let agent = || cluster.env.agent().config_file(file.to_str().expect("a path in UTF-8"));
    cluster.server.set_labels(NODE, json!({ "tier": "production" }));
    let stored = cluster.env.state_dir().join("last-good.toml");
    let first = agent().spawn_ready();
    // The agent stores the file a moment after `status` says that it is ready.
    poll_until(LONG, "the last good configuration", || stored.exists().then_some(()));
    drop(first);
    // As after a reboot with a broken file: the pins are gone, the stored file stays.
    let kept = cluster.env.scratch_dir().join("kept.toml");
    std::fs::rename(&stored, &kept).expect("keep the last good configuration");
    cluster.env.unload();
    std::fs::create_dir_all(cluster.env.state_dir()).expect("create the state directory");
    std::fs::rename(&kept, &stored).expect("restore the last good configuration");
    std::fs::write(&file, format!("typo = 1\n{good}")).expect("write a configuration");
    cluster.server.set_labels(NODE, json!({ "tier": "test" }));
    let _agent = agent().spawn_degraded("configuration rejected");
    wait_pool(&cluster, Some("test"), "off");
}

#[test]
fn labels_of_the_command_line_suffice() {
    let cluster = TestCluster::new();
    let _agent = command(&cluster).args(&["--node-labels", "tier=production,zone=1"]).spawn_ready();
    wait_pool(&cluster, Some("production"), "enforce");
    assert!(cluster.server.requests().iter().all(|target| !target.starts_with("/api/v1/nodes/")));
}

#[test]
fn pool_is_checked_for_a_node() {
    let cluster = TestCluster::new();
    let file = cluster.env.scratch_dir().join("pools.toml");
    std::fs::write(&file, POOLS).expect("write a configuration");
    // The command reads neither maps nor the network.
    let agent = cluster.env.imds_agent(&[]).command().get_program().to_owned();
    let check = |arguments: &[&str]| {
        let mut command = Command::new(&agent);
        command.args(["config", "check"]).arg(&file).args(arguments);
        let output = output(command);
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    for (arguments, pool, mode) in [
        (&[][..], "none", "audit"),
        (&["--node-labels", "tier=production"], "production", "enforce"),
        (&["--node-labels", "tier=test", "--node-name", "node-7"], "test", "off"),
        (&["--node-name", "node-7"], "none", "audit"),
    ] {
        let text = check(arguments);
        let lines: Vec<_> = text.lines().collect();
        assert!(lines.contains(&format!("node pool  {pool} (of production, test)").as_str()), "{text}");
        assert!(lines.contains(&format!("mode       {mode}").as_str()), "{text}");
    }
    assert!(check(&["--node-labels", "tier"]).is_empty());
}
