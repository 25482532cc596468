//! Neither a user of the node nor a client of the API server can take over a pod's identity, or revoke it unnoticed.

use std::{
    fs,
    os::unix::fs::chown,
    path::{Path, PathBuf},
};

use imds_tests::{
    AgentCommand, Pod, PodLink, TestCluster,
    api_server::pod,
    known_here,
    kubelet::{Driver, Kubelet, PodCgroup, new_uid},
    probe::LONG,
};
use serde_json::{Value, json};

const RULE: &str = "[[exempt]]\nname = 'trusted'\nnamespace = 'kube-system'\nservice_account = 'agent'\n";

fn command(cluster: &TestCluster) -> AgentCommand<'_> {
    cluster.env.agent().config(&cluster.config(RULE)).hooks(&known_here(&["from_pod", "node_egress"]))
}

/// Starts a sandbox for the pod with this id of the kubelet.
fn run(cluster: &TestCluster, kubelet: &Kubelet, uid: &str) -> (Pod, PodCgroup) {
    let pod = cluster.env.add_pod(PodLink::Routed);
    let mut cgroup = kubelet.add_pod(uid, Driver::Cgroupfs);
    cgroup.start_in(&pod.netns);
    (pod, cgroup)
}

fn trusted(uid: &str) -> Value {
    pod(uid, TestCluster::NODE, "kube-system", "agent", &[])
}

/// Gives a cgroup and its descendants to a user, as systemd does with `Delegate=yes`.
fn delegate(path: &Path) {
    chown(path, Some(1000), Some(1000)).unwrap();
    let is_dir = |path: &PathBuf| path.is_dir();
    for child in fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).filter(is_dir) {
        delegate(&child);
    }
}

#[test]
fn user_cgroup_with_pod_id_is_ignored() {
    let cluster = TestCluster::new();
    let (uid, other) = (new_uid(), new_uid());
    let of_user = Kubelet::new();
    let (attacker, _processes) = run(&cluster, &of_user, &uid);
    delegate(of_user.root());
    cluster.server.apply(trusted(&uid));
    cluster.server.apply(trusted(&other));
    let agent = command(&cluster).spawn_ready();
    // Once a later pod of the kubelet is exempt, the agent has examined all cgroups.
    let (pod, _processes_of_pod) = run(&cluster, &cluster.kubelet, &other);
    cluster.wait_exempt(&pod);
    cluster.assert_denied(&attacker.netns);

    // The kubelet starts the pod: it gets its exemption, and the user still has none.
    let (exempt, _processes_of_exempt) = run(&cluster, &cluster.kubelet, &uid);
    cluster.wait_exempt(&exempt);
    cluster.assert_denied(&attacker.netns);
    drop(agent);
    cluster.env.unload();
    assert!(cluster.reaches(&attacker.netns));
}

#[test]
fn duplicate_root_cgroups_exempt_no_pod() {
    let cluster = TestCluster::new();
    let uid = new_uid();
    let of_container = Kubelet::new();
    let (attacker, processes) = run(&cluster, &of_container, &uid);
    let (pod, _processes_of_pod) = run(&cluster, &cluster.kubelet, &uid);
    cluster.server.apply(trusted(&uid));
    let agent = command(&cluster).spawn_degraded("several cgroups have its UID");
    let line = agent.wait_for_log("several cgroups have its UID", LONG);
    assert!(line.contains(&format!("kube-system/pod-{uid}")), "{line}");
    for pod in [&attacker, &pod] {
        cluster.assert_denied(&pod.netns);
    }
    drop(processes);
    cluster.wait_exempt(&pod);
    cluster.assert_denied(&attacker.netns);
    drop(agent);
    cluster.env.unload();
}

#[test]
fn copied_mirror_annotation_is_reported() {
    let cluster = TestCluster::new();
    let (uid, copy) = (new_uid(), new_uid());
    let hash = format!("{:0>32}", uid.replace('-', ""));
    let mirror = |mut object: Value, created: &str| {
        object["metadata"]["creationTimestamp"] = created.into();
        object["metadata"]["annotations"] =
            json!({ "kubernetes.io/config.mirror": hash, "kubernetes.io/config.hash": hash });
        object
    };
    let (pod, _processes) = run(&cluster, &cluster.kubelet, &hash);
    cluster.server.apply(mirror(trusted(&uid), "2026-11-23T15:04:05Z"));
    let agent = command(&cluster).spawn_ready();
    cluster.wait_exempt(&pod);

    let object = imds_tests::api_server::pod(&copy, TestCluster::NODE, "tenant", "default", &[]);
    cluster.server.apply(mirror(object, "2026-11-23T15:04:06Z"));
    let status = cluster.env.status_when("the copy is reported", |status| {
        status.kubernetes.as_ref().is_some_and(|kubernetes| kubernetes.disputed == 1)
    });
    assert_eq!(status.state, "degraded");
    assert!(status.problems.iter().any(|problem| problem.problem.contains("config.hash")), "{status:?}");
    let line = agent.wait_for_log("claims the cgroup of the older static pod", LONG);
    for name in [format!("tenant/pod-{copy}"), format!("kube-system/pod-{uid}")] {
        assert!(line.contains(&name), "{line}");
    }
    let pods = |state: &str| cluster.metric(&format!("imds_agent_kubernetes_pods{{state=\"{state}\"}}"));
    assert_eq!((pods("known"), pods("disputed")), (2, 1));
    assert!(cluster.reaches(&pod.netns));
    let names: Vec<_> = status.exemptions.iter().filter_map(|sender| sender.pod.as_ref()).collect();
    assert!(!names.is_empty() && names.iter().all(|pod| pod.uid == uid), "{names:?}");

    cluster.server.delete(&copy);
    cluster.env.status_when("the copy is deleted", |status| {
        status.state == "enforcing" && status.exemptions.iter().any(|sender| sender.pod.is_some())
    });
    assert!(cluster.reaches(&pod.netns));
    drop(agent);
    cluster.env.unload();
}
