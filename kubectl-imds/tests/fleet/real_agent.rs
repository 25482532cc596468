//! The plugin and a real agent, whose commands run in the test environment.

use std::{fs, sync::Arc};

use imds_tests::{
    METADATA, PodLink, TestEnv,
    api_server::Exec,
    poll::poll_until,
    probe::{LONG, SHORT, http_get},
};
use serde_json::Value;

use super::{Cluster, pod};

/// Returns a pod in which the commands of the environment's agent run.
fn exec_in(env: &TestEnv) -> Exec {
    let (node, pins) = (Arc::clone(&env.node), env.pin_dir().to_owned());
    let binary = env.imds_agent(&[]).command().get_program().to_owned();
    Exec::Run(Arc::new(move |words| {
        assert_eq!(words[0], "/imds-agent");
        let mut command = node.command(&binary);
        command.args(&words[1..]).arg("--pin-dir").arg(&pins);
        command
    }))
}

#[test]
fn real_agent_answers() {
    let env = TestEnv::new();
    let sender = env.add_pod(PodLink::Routed);
    let unit = env.add_cgroup("backup.scope");
    let config = "[[exempt]]\nname = 'router'\nnetns = '/run/netns/router'\nendpoints = ['imds']\n";
    let agent = env.agent().config(config).hooks(&["from_pod", "node_egress", "socket"]).spawn_ready();
    let cluster = Cluster::new(&["n1"]);
    cluster.server.on_exec(&pod("n1"), exec_in(&env));
    let status = cluster.json("status", 0);
    let row = &status["nodes"][0];
    assert_eq!(
        (&row["state"], &row["mode"], &row["ready"]),
        (&"enforcing".into(), &"enforce".into(), &true.into())
    );
    assert_eq!(row["attached"], row["attachments"]);
    assert!(row["config_hash"].as_str().is_some_and(|hash| hash.len() == 12), "{row}");

    assert!(!http_get(&sender.netns, METADATA, SHORT).is_answer());
    unit.run(|| assert!(!http_get(&sender.netns, METADATA, SHORT).is_answer()));
    let (events, _) = poll_until(LONG, "an event", || {
        let (events, stderr) = cluster.run("events --no-follow --since 1h", 0);
        (events.contains("169.254.169.254:80")).then_some((events, stderr))
    });
    assert!(events.lines().all(|line| line.starts_with("n1 20")), "{events}");
    let report = poll_until(LONG, "denials", || {
        Some(cluster.json("report", 0))
            .filter(|report| report["denials"].as_array().is_some_and(|all| !all.is_empty()))
    });
    assert_eq!(report["denials"][0]["verdict"], "denied");

    // The merged rules must be a valid part of a configuration. The agent can read the second denial later than the first one.
    let rules = poll_until(LONG, "a rule for the unit", || {
        Some(cluster.run("report --rules", 0).0).filter(|rules| rules.contains("backup.scope"))
    });
    assert!(rules.contains("[[exempt]]\nname = "), "{rules}");
    let file = env.scratch_dir().join("merged.toml");
    fs::write(&file, rules).unwrap();
    let mut check = std::process::Command::new(env.imds_agent(&[]).command().get_program());
    let output = imds_tests::output({
        check.args(["config", "check"]).arg(&file);
        check
    });
    assert!(output.status.success(), "{output:?}");

    let rules = cluster.json("rules", 0);
    assert_eq!((&rules["rules"][0]["name"], &rules["rules"][0]["senders"]), (&"router".into(), &0.into()));
    let (compared, _) = cluster.run("compare", 0);
    assert!(compared.starts_with("all of 1 node are equal:"), "{compared}");
    drop(agent);
    let status = cluster.json("status", 3);
    assert_eq!(status["nodes"][0]["state"], Value::from("degraded"));
}
