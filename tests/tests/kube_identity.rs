//! Neither a user of the node nor a client of the API server can take over a pod's identity, or revoke it unnoticed.

use std::{
    fs,
    os::unix::fs::chown,
    path::{Path, PathBuf},
};

use imds_tests::{
    Agent, METADATA, Pod, PodLink, TestEnv,
    api_server::{ApiServer, pod},
    http::{DEFAULT, try_get},
    known_here,
    kubelet::{Driver, Kubelet, PodCgroup, new_uid},
    poll::poll_until,
    probe::{LONG, SHORT, http_get},
};
use serde_json::{Value, json};

const NODE: &str = "node-0";
const RULE: &str = "[[exempt]]\nname = 'trusted'\nnamespace = 'kube-system'\nservice_account = 'agent'\n";

struct Cluster {
    // Dropped before its network.
    server: ApiServer,
    kubelet: Kubelet,
    env: TestEnv,
}

impl Cluster {
    fn new() -> Self {
        let env = TestEnv::new();
        Self { server: ApiServer::start_in(&env.node), kubelet: Kubelet::new(), env }
    }

    fn start(&self) -> Agent<'_> {
        let kubeconfig = self.env.scratch_dir().join("kubeconfig");
        self.server.write_kubeconfig(&kubeconfig);
        let kubernetes = format!("kubeconfig = '{}'\nnode_name = '{NODE}'\n", kubeconfig.display());
        let config = format!("{RULE}[kubernetes]\n{kubernetes}");
        self.env.agent().config(&config).hooks(&known_here(&["from_pod", "node_egress"])).spawn_ready()
    }

    /// Starts a sandbox for the pod with this id of the kubelet.
    fn run(&self, kubelet: &Kubelet, uid: &str) -> (Pod, PodCgroup) {
        let pod = self.env.add_pod(PodLink::Routed);
        let mut cgroup = kubelet.add_pod(uid, Driver::Cgroupfs);
        cgroup.start_in(&pod.netns);
        (pod, cgroup)
    }

    fn reaches(&self, pod: &Pod) -> bool {
        self.env.in_cgroup(|| http_get(&pod.netns, METADATA, SHORT).is_answer())
    }

    #[track_caller]
    fn wait_exempt(&self, pod: &Pod) {
        poll_until(LONG, "the pod to be exempt", || self.reaches(pod).then_some(()));
    }

    fn metric(&self, state: &str) -> String {
        let (_, metrics) = try_get(&self.env, DEFAULT, "/metrics").unwrap();
        let series = format!("imds_agent_kubernetes_pods{{state=\"{state}\"}} ");
        metrics.lines().find_map(|line| line.strip_prefix(&series)).unwrap_or_default().to_owned()
    }
}

fn trusted(uid: &str) -> Value {
    pod(uid, NODE, "kube-system", "agent", &[])
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
    let cluster = Cluster::new();
    let (uid, other) = (new_uid(), new_uid());
    let of_user = Kubelet::new();
    let (attacker, _processes) = cluster.run(&of_user, &uid);
    delegate(of_user.root());
    cluster.server.apply(trusted(&uid));
    cluster.server.apply(trusted(&other));
    let agent = cluster.start();
    // Once a later pod of the kubelet is exempt, the agent has examined all cgroups.
    let (pod, _processes_of_pod) = cluster.run(&cluster.kubelet, &other);
    cluster.wait_exempt(&pod);
    cluster.env.assert_nothing_arrives(|| assert!(!cluster.reaches(&attacker)));

    // The kubelet starts the pod: it gets its exemption, and the user still has none.
    let (exempt, _processes_of_exempt) = cluster.run(&cluster.kubelet, &uid);
    cluster.wait_exempt(&exempt);
    cluster.env.assert_nothing_arrives(|| assert!(!cluster.reaches(&attacker)));
    drop(agent);
    cluster.env.unload();
    assert!(cluster.reaches(&attacker));
}

#[test]
fn duplicate_root_cgroups_exempt_no_pod() {
    let cluster = Cluster::new();
    let uid = new_uid();
    let of_container = Kubelet::new();
    let (attacker, processes) = cluster.run(&of_container, &uid);
    let (pod, _processes_of_pod) = cluster.run(&cluster.kubelet, &uid);
    cluster.server.apply(trusted(&uid));
    let agent = cluster.start();
    let line = agent.wait_for_log("several cgroups have its UID", LONG);
    assert!(line.contains(&format!("kube-system/pod-{uid}")), "{line}");
    for pod in [&attacker, &pod] {
        cluster.env.assert_nothing_arrives(|| assert!(!cluster.reaches(pod)));
    }
    drop(processes);
    cluster.wait_exempt(&pod);
    cluster.env.assert_nothing_arrives(|| assert!(!cluster.reaches(&attacker)));
    drop(agent);
    cluster.env.unload();
}

#[test]
fn copied_mirror_annotation_is_reported() {
    let cluster = Cluster::new();
    let (uid, copy) = (new_uid(), new_uid());
    let hash = format!("{:0>32}", uid.replace('-', ""));
    let mirror = |mut object: Value, created: &str| {
        object["metadata"]["creationTimestamp"] = created.into();
        object["metadata"]["annotations"] =
            json!({ "kubernetes.io/config.mirror": hash, "kubernetes.io/config.hash": hash });
        object
    };
    let (pod, _processes) = cluster.run(&cluster.kubelet, &hash);
    cluster.server.apply(mirror(trusted(&uid), "2026-11-23T15:04:05Z"));
    let agent = cluster.start();
    cluster.wait_exempt(&pod);

    let object = imds_tests::api_server::pod(&copy, NODE, "tenant", "default", &[]);
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
    assert_eq!((cluster.metric("known"), cluster.metric("disputed")), ("2".to_owned(), "1".to_owned()));
    assert!(cluster.reaches(&pod));
    let names: Vec<_> = status.exemptions.iter().filter_map(|sender| sender.pod.as_ref()).collect();
    assert!(!names.is_empty() && names.iter().all(|pod| pod.uid == uid), "{names:?}");

    cluster.server.delete(&copy);
    cluster.env.status_when("the copy is deleted", |status| {
        status.state == "enforcing" && status.exemptions.iter().any(|sender| sender.pod.is_some())
    });
    assert!(cluster.reaches(&pod));
    drop(agent);
    cluster.env.unload();
}
