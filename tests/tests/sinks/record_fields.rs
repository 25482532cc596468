//! Contents of the records: sender, pod, process, rule and verdict.

use std::fs;

use imds_tests::{
    METADATA, PodLink, TestCluster, TestEnv, WHOLE_TEST,
    api_server::pod,
    kubelet::{Driver, new_uid},
    poll::poll_until,
    probe::{LONG, SHORT, http_get},
    skip, skip_without_netns_cookie,
};
use nix::sys::prctl;
use serde_json::{Value, json};

use crate::{file_sink, records, send, sinks, wait_records};

#[test]
fn packet_record_names_sender_and_endpoint() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let path = env.scratch_dir().join("denials.jsonl");
    let agent = env.agent().config(&sinks(&[file_sink(&path)])).spawn_ready();
    send(&pod, [40_000]);
    let record = &wait_records(&path, 1)[0];
    assert_eq!(
        (&record["schema"], &record["verdict"], &record["hook"]),
        (&1.into(), &"denied".into(), &"from_pod".into())
    );
    assert_eq!(
        record["src_endpoint"],
        json!({ "ip": pod.address.to_string(), "port": 40_000, "interface_name": pod.host_ifname })
    );
    assert_eq!(record["dst_endpoint"], json!({ "name": "imds", "ip": METADATA.to_string(), "port": 80 }));
    assert_eq!((&record["pod"], &record["rule"]), (&Value::Null, &Value::Null));
    assert_eq!(record["bytes"], env.status().total.denied.bytes);
    assert!(record["node"].as_str().is_some_and(|node| !node.is_empty()), "{record}");
    drop(agent);
    env.unload();
}

/// Adds the paths of all fields of an object, such as `pod.name`.
fn add_paths(prefix: &str, object: &Value, paths: &mut Vec<String>) {
    for (name, value) in object.as_object().into_iter().flatten() {
        paths.push(format!("{prefix}{name}"));
        add_paths(&format!("{prefix}{name}."), value, paths);
    }
}

#[test]
fn document_shows_every_field() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/siem.md");
    let Ok(document) = fs::read_to_string(path) else {
        skip(WHOLE_TEST, "there is no repository on this machine");
        return;
    };
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let path = env.scratch_dir().join("denials.jsonl");
    let agent = env.agent().config(&sinks(&[file_sink(&path)])).spawn_ready();
    send(&pod, [40_000]);
    let record = wait_records(&path, 1).remove(0);
    let example = document.split("```json\n").nth(1).unwrap().split("```").next().unwrap();
    let example: Value = serde_json::from_str(example).unwrap();
    let [mut sent, mut shown] = [Vec::new(), Vec::new()];
    add_paths("", &record, &mut sent);
    add_paths("", &example, &mut shown);
    // The sender of the packet has no known pod.
    shown.retain(|path| !path.starts_with("pod."));
    assert_eq!(sent, shown);
    let is_described = |path: &String| {
        document.contains(&format!("`{path}`"))
            || ["src_endpoint", "dst_endpoint", "actor"].contains(&path.as_str())
    };
    assert!(sent.iter().all(is_described), "{sent:?}");
    drop(agent);
    env.unload();
}

#[test]
fn first_packet_of_a_new_pod_has_its_name() {
    let cluster = TestCluster::new();
    let (env, uid) = (&cluster.env, new_uid());
    let path = env.scratch_dir().join("denials.jsonl");
    let config = cluster.config(&sinks(&[file_sink(&path)]));
    let agent = env.agent().config(&config).spawn_ready();
    let new = env.add_pod(PodLink::Routed);
    env.wait_enforced(&new);
    let mut cgroup = cluster.kubelet.add_pod(&uid, Driver::Cgroupfs);
    cgroup.start_in(&new.netns);
    send(&new, [40_000]);
    // The agent learns of the pod only now.
    cluster.server.apply(pod(&uid, TestCluster::NODE, "default", "robot", &[("app", "web")]));
    let record = &wait_records(&path, 1)[0];
    assert_eq!(record["node"], TestCluster::NODE);
    assert_eq!(
        record["pod"],
        json!({ "namespace": "default", "name": format!("pod-{uid}"), "uid": uid, "service_account": "robot",
                "container": null, "label": "app=web" })
    );

    // A sender without a pod is recorded after the wait.
    let unknown = env.add_pod(PodLink::Routed);
    env.wait_enforced(&unknown);
    send(&unknown, [40_001]);
    let record = &wait_records(&path, 2)[1];
    assert_eq!((&record["pod"], &record["src_endpoint"]["port"]), (&Value::Null, &40_001.into()));
    drop(agent);
    env.unload();
}

#[test]
fn call_record_has_process_and_cgroup() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Bridged);
    let path = env.scratch_dir().join("denials.jsonl");
    let agent = env.agent().config(&sinks(&[file_sink(&path)])).hooks(&["socket"]).spawn_ready();
    let container = env.add_cgroup("docker.scope");
    container.run(|| {
        // The thread that connects inherits the name.
        prctl::set_name(c"a\"]\n<0>\x1b\\").unwrap();
        assert!(!http_get(&pod.netns, METADATA, SHORT).is_answer());
    });
    let record = &wait_records(&path, 1)[0];
    assert_eq!(record["hook"], "socket");
    let process = &record["actor"]["process"];
    assert_eq!(process["pid"], std::process::id());
    assert_eq!(process["name"], "a\"]\\n<0>\\u{1b}\\", "{process}");
    let cgroup = record["actor"]["cgroup"].as_str().unwrap();
    assert!(cgroup.ends_with("docker.scope"), "{cgroup}");
    drop(agent);
    env.unload();
}

#[test]
fn audited_record_names_the_rule() {
    let env = TestEnv::new();
    let [audited, denied] = [PodLink::Routed, PodLink::Routed].map(|link| env.add_pod(link));
    let (all, only_audited) = (env.scratch_dir().join("all"), env.scratch_dir().join("audited"));
    let rule = format!("[[exempt]]\nname = 'backup'\ninterface = '{}'\naudit = true\n", audited.host_ifname);
    let config = format!("{}{rule}", sinks(&[file_sink(&all)]));
    let agent = env.agent().config(&config).spawn_ready();
    send(&audited, [40_000]);
    let record = &wait_records(&all, 1)[0];
    assert_eq!((&record["verdict"], &record["rule"]), (&"audited".into(), &"backup".into()));
    send(&denied, [40_001]);
    // The answer to the audited pod makes it send another packet.
    let record = poll_until(LONG, "a denied packet", || {
        records(&all).into_iter().find(|record| record["src_endpoint"]["port"] == 40_001)
    });
    assert_eq!((&record["verdict"], &record["rule"]), (&"denied".into(), &Value::Null));
    drop(agent);

    let config = format!("{}verdicts = ['audited']\n{rule}", sinks(&[file_sink(&only_audited)]));
    let agent = env.agent().config(&config).spawn_ready();
    send(&denied, [40_002]);
    send(&audited, [40_003]);
    assert_eq!(wait_records(&only_audited, 1)[0]["src_endpoint"]["port"], 40_003);
    drop(agent);
    assert!(records(&only_audited).iter().all(|record| record["verdict"] == "audited"));
    env.unload();
}
