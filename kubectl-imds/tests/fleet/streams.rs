//! Events of several nodes as one stream.

use std::{
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
    sync::Arc,
};

use imds_tests::api_server::{Exec, agent_pod};

use super::{Cluster, pod};

/// Returns a pod whose agent prints its arguments as an event and waits for more.
fn following(name: &'static str) -> Exec {
    Exec::Run(Arc::new(move |words| {
        let mut command = Command::new("sh");
        command.args(["-c", "echo \"$0\"; exec sleep 1000"]).arg(format!("{name}: {}", words[1..].join(" ")));
        command
    }))
}

#[test]
fn recorded_events_name_their_node() {
    let cluster = Cluster::new(&["n1", "n2"]);
    cluster
        .server
        .on_exec(&pod("n1"), Exec::table(&[("/imds-agent events --no-follow", "one\ntwo\u{1b}\n", 0)]));
    cluster.server.on_exec(&pod("n2"), Exec::table(&[]));
    let (stdout, stderr) = cluster.run("events --no-follow", 3);
    assert_eq!(stdout, "n1 one\nn1 two\\u{1b}\n");
    assert!(stderr.contains("n2: no answer to /imds-agent events --no-follow (exit code 1)"), "{stderr}");
    let events = "/imds-agent events -o json --since 10m --no-follow";
    cluster.server.on_exec(&pod("n1"), Exec::table(&[(events, "{\"time\":\"t\"}\n", 0)]));
    let (stdout, _) = cluster.run("events --no-follow --since 10m -o json --node n1", 0);
    assert_eq!(stdout, "{\"node\":\"n1\",\"time\":\"t\"}\n");
}

#[test]
fn replaced_pod_is_followed() {
    let cluster = Cluster::new(&["n1", "n2"]);
    for node in ["n1", "n2"] {
        cluster.server.on_exec(&pod(node), following("first"));
    }
    let mut child =
        cluster.command("events --since 1h").stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let mut first: Vec<_> = lines.by_ref().take(2).collect();
    first.sort();
    let expected = ["n1", "n2"].map(|node| format!("{node} first: events --since 1h"));
    assert_eq!(first, expected);
    // The new pod has another name. Its unread events are printed, not those of the last hour again.
    cluster.server.on_exec("imds-agent-new", following("second"));
    cluster.server.on_exec(&pod("n1"), Exec::Close(""));
    cluster.server.set_agent_pods(vec![agent_pod("imds-agent-new", "n1"), agent_pod(&pod("n2"), "n2")]);
    cluster.server.disconnect();
    let mut next: Vec<_> = lines.take(2).collect();
    next.sort();
    assert_eq!(next, ["n1 second: events", "n2 first: events"]);
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn closed_output_ends_the_stream() {
    let cluster = Cluster::new(&["n1"]);
    cluster.server.on_exec(
        &pod("n1"),
        Exec::Run(Arc::new(|_| {
            let mut command = Command::new("sh");
            command.args(["-c", "while echo line; do sleep 0.01; done"]);
            command
        })),
    );
    let mut child = cluster.command("events").stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "n1 line");
    drop(lines);
    assert!(child.wait().unwrap().success());
}
