//! Exemptions of Kubernetes pods, from the API server's events to the packets.

use std::{fs, thread};

use imds_tests::{
    Agent, METADATA, Pod, PodLink, StopFlag, TestCluster,
    api_server::{Fault, pod},
    known_here,
    kubelet::{CONTAINER, Driver, PodCgroup, new_uid},
    lacks_netns_cookie,
    poll::poll_until,
    probe::{LONG, SHORT, http_get},
    scaled, skip_without_netns_cookie,
};
use serde_json::Value;

const ALL: &[&str] = &["from_pod", "node_egress", "socket"];
const TRUSTED: &[(&str, &str)] = &[("app", "agent")];
const RULE: &str = "
    [[exempt]]
    name = 'trusted'
    namespace = 'kube-system'
    service_account = 'agent'
    pod_selector = { match_labels = { app = 'agent' } }";

/// A scheduled pod: it has a link and cgroups, and a process once it is started.
struct Scheduled {
    uid: String,
    cgroup: PodCgroup,
    pod: Pod,
}

/// Starts an agent with [`RULE`].
fn start(cluster: &TestCluster) -> Agent<'_> {
    cluster.env.agent().config(&cluster.config(RULE)).hooks(&known_here(ALL)).spawn_ready()
}

fn schedule(cluster: &TestCluster, link: PodLink, driver: Driver, labels: &[(&str, &str)]) -> Scheduled {
    let uid = new_uid();
    let cgroup = cluster.kubelet.add_pod(&uid, driver);
    let scheduled = Scheduled { uid, cgroup, pod: cluster.env.add_pod(link) };
    cluster.server.apply(scheduled.object(labels));
    scheduled
}

/// Waits until the agent knows this number of pods from the API server.
fn wait_known(cluster: &TestCluster, pods: u32) {
    cluster.env.status_when("the pods are known", |status| {
        status.kubernetes.as_ref().is_some_and(|kubernetes| kubernetes.pods == pods)
    });
}

impl Scheduled {
    fn object(&self, labels: &[(&str, &str)]) -> Value {
        pod(&self.uid, TestCluster::NODE, "kube-system", "agent", labels)
    }

    /// Starts the pod's sandbox with one process.
    fn start(&mut self) -> &Pod {
        self.cgroup.start_in(&self.pod.netns);
        &self.pod
    }
}

#[test]
fn exemption_follows_sandbox_label_and_pod() {
    for (link, driver) in [(PodLink::Routed, Driver::Cgroupfs), (PodLink::Bridged, Driver::Systemd)] {
        let cluster = TestCluster::new();
        let agent = start(&cluster);
        let mut trusted = schedule(&cluster, link, driver, TRUSTED);
        let mut other = schedule(&cluster, link, driver, &[("app", "web")]);
        other.start();
        wait_known(&cluster, 2);
        cluster.wait_denied(&trusted.pod);
        trusted.start();
        cluster.wait_exempt(&trusted.pod);
        cluster.wait_denied(&other.pod);

        cluster.server.apply(trusted.object(&[]));
        cluster.wait_denied(&trusted.pod);
        cluster.server.apply(trusted.object(TRUSTED));
        cluster.wait_exempt(&trusted.pod);
        let mut ended = trusted.object(TRUSTED);
        ended["status"]["phase"] = "Succeeded".into();
        cluster.server.apply(ended);
        cluster.wait_denied(&trusted.pod);
        cluster.server.apply(trusted.object(TRUSTED));
        cluster.wait_exempt(&trusted.pod);
        cluster.server.delete(&trusted.uid);
        cluster.wait_denied(&trusted.pod);
        cluster.env.status_when("no sender is exempt", |status| status.exemptions.is_empty());
        drop(agent);
        cluster.env.unload();
        assert!(cluster.reaches(&trusted.pod.netns));
    }
}

#[test]
fn recreated_sandbox_is_found_again() {
    let cluster = TestCluster::new();
    let agent = start(&cluster);
    let mut trusted = schedule(&cluster, PodLink::Routed, Driver::Systemd, TRUSTED);
    trusted.start();
    cluster.wait_exempt(&trusted.pod);
    // The runtime creates another sandbox for the same pod, without an event of the API server.
    trusted.cgroup.stop();
    let (index, address) = (trusted.pod.host_ifindex, trusted.pod.address);
    trusted.pod.delete();
    let successor = cluster.env.add_successor("guest1", index, address);
    cluster.assert_denied(&successor);
    let again = cluster.env.add_pod(PodLink::Routed);
    trusted.cgroup.start_in(&again.netns);
    cluster.wait_exempt(&again);
    cluster.assert_denied(&successor);
    drop(agent);
    cluster.env.unload();
    assert!(cluster.reaches(&successor));
}

#[test]
fn api_outage_keeps_known_exemptions_only() {
    let cluster = TestCluster::new();
    let config = cluster.env.scratch_dir().join("imds.toml");
    let hooks = if lacks_netns_cookie() { "[hooks]\nsocket = false" } else { "" };
    let rules = format!("{}\n{hooks}", cluster.config(RULE));
    fs::write(&config, &rules).unwrap();
    let (config, cgroup) = (config.to_str().unwrap(), cluster.env.cgroup().to_str().unwrap());
    let command = || cluster.env.agent().config_file(config).args(&["--cgroup", cgroup]);
    let agent = command().spawn_ready();
    let mut trusted = schedule(&cluster, PodLink::Routed, Driver::Systemd, TRUSTED);
    trusted.start();
    cluster.wait_exempt(&trusted.pod);
    // Enough failures to outlast the test.
    for _ in 0..100 {
        cluster.server.fail(Fault::Status(500, "etcdserver: no leader"));
    }
    cluster.server.disconnect();
    let status = cluster.env.status_when("the failure is reported", |status| {
        status.kubernetes.as_ref().is_some_and(|kubernetes| {
            !kubernetes.connected
                && kubernetes.error.as_ref().is_some_and(|error| error.contains("no leader"))
        })
    });
    assert!(status.problems.is_empty() && status.kubernetes.is_some_and(|kubernetes| kubernetes.pods == 1));
    let mut unknown = schedule(&cluster, PodLink::Routed, Driver::Systemd, TRUSTED);
    unknown.start();
    cluster.wait_denied(&unknown.pod);
    assert!(cluster.reaches(&trusted.pod.netns));

    // The next agent gets no pods from the API server.
    agent.kill9();
    let agent = command().spawn_degraded("has not sent this node's pods yet");
    assert!(cluster.reaches(&trusted.pod.netns), "{}", agent.log());
    cluster.assert_denied(&unknown.pod.netns);
    agent.kill9();

    // Rules that differ from the earlier agent's keep none of its exemptions.
    fs::write(config, rules.replace("'trusted'", "'others'")).unwrap();
    let agent = command().spawn_degraded("has not sent this node's pods yet");
    cluster.assert_denied(&trusted.pod.netns);
    drop(agent);
    cluster.env.unload();
    assert!(cluster.reaches(&unknown.pod.netns));
}

#[test]
fn host_network_pod_is_exempt_by_cgroups() {
    if skip_without_netns_cookie() {
        return;
    }
    let cluster = TestCluster::new();
    let mut trusted = schedule(&cluster, PodLink::Routed, Driver::Systemd, &[]);
    let config = cluster.env.scratch_dir().join("imds.toml");
    let hooks = "[hooks]\nfrom_pod = false\nnode_egress = false\nsocket = false\nhost_network = true";
    fs::write(&config, format!("{}\n{hooks}", cluster.config(RULE))).unwrap();
    let (config, cgroup) = (config.to_str().unwrap(), cluster.kubelet.root().to_str().unwrap());
    let agent = cluster.env.agent().config_file(config).args(&["--cgroup", cgroup]).spawn_ready();
    let mut object = trusted.object(TRUSTED);
    object["spec"]["hostNetwork"] = true.into();
    cluster.server.apply(object);
    trusted.cgroup.start_in(&cluster.env.node);
    let assert_exempt_pods = |number: usize| {
        cluster.env.status_when("its cgroups are exempt", |status| {
            let mut exempt = status.exemptions.iter().filter(|sender| sender.cgroup.is_some());
            exempt.clone().count() == number && exempt.all(|sender| sender.pod.is_some())
        })
    };
    let before = assert_exempt_pods(2);
    assert!(
        before.exemptions.iter().all(|sender| sender.pod.as_ref().is_some_and(|pod| pod.uid == trusted.uid))
    );
    // A container that the API server has not reported.
    let later = trusted.cgroup.path.join("cri-containerd-later.scope");
    fs::create_dir(&later).unwrap();
    assert_exempt_pods(3);
    fs::remove_dir(&later).unwrap();
    assert_exempt_pods(2);
    cluster.server.delete(&trusted.uid);
    assert_exempt_pods(0);
    drop(agent);
    cluster.env.unload();
}

#[test]
fn pod_names_are_shown_everywhere() {
    let cluster = TestCluster::new();
    let agent = start(&cluster);
    let mut scheduled = schedule(&cluster, PodLink::Routed, Driver::Systemd, TRUSTED);
    scheduled.start();
    let mut object = scheduled.object(TRUSTED);
    let container = format!("containerd://{CONTAINER}");
    object["status"]["containerStatuses"] = serde_json::json!([{ "name": "main", "containerID": container }]);
    cluster.server.apply(object);
    let status = cluster.env.status_when("the pod has a name", |status| {
        status.find(&scheduled.pod.host_ifname).is_some_and(|interface| interface.pod.is_some())
    });
    let pod = status.find(&scheduled.pod.host_ifname).unwrap().pod.clone().unwrap();
    assert_eq!(
        (pod.namespace.as_str(), pod.pod, pod.service_account.as_str(), pod.uid, pod.label.as_deref()),
        ("kube-system", format!("pod-{}", scheduled.uid), "agent", scheduled.uid.clone(), Some("app=agent"))
    );
    let table = cluster.env.imds_agent(&["status"]).output();
    let table = String::from_utf8(table.stdout).unwrap();
    assert!(
        table.contains(&format!("kube-system/pod-{}", scheduled.uid)) && table.contains(TestCluster::NODE),
        "{table}"
    );

    cluster.server.delete(&scheduled.uid);
    cluster.env.status_when("the pod is forgotten", |status| {
        status.find(&scheduled.pod.host_ifname).is_some_and(|interface| interface.pod.is_none())
    });
    drop(agent);
    cluster.env.unload();
}

#[test]
fn only_changes_of_1000_pods_are_written() {
    let cluster = TestCluster::new();
    let agent = start(&cluster);
    let pods = scaled(1000);
    for number in 0..pods {
        let labels: &[_] = if number % 2 == 0 { TRUSTED } else { &[] };
        cluster.server.apply(pod(
            &format!("{}-{number}", new_uid()),
            TestCluster::NODE,
            "kube-system",
            "agent",
            labels,
        ));
    }
    let mut trusted = [(); 3].map(|()| schedule(&cluster, PodLink::Routed, Driver::Systemd, TRUSTED));
    for pod in &mut trusted {
        pod.start();
    }
    wait_known(&cluster, pods + 3);
    for pod in &trusted {
        cluster.wait_exempt(&pod.pod);
    }
    let writes = || {
        ["imds_exempt", "imds_pods"]
            .map(|map| cluster.metric(&format!("imds_agent_map_updates_total{{map=\"{map}\"}}")))
    };
    let before = writes();
    cluster.server.compact();
    cluster.server.disconnect();
    poll_until(LONG, "all pods to be listed again", || {
        (cluster.metric("imds_agent_kubernetes_relists_total") >= 2).then_some(())
    });
    // The kernel may complete an address of a started pod at any time, which adds one key.
    let listed = writes();
    assert!(listed[0] - before[0] <= 3 && listed[1] == before[1], "{listed:?} after {before:?}");

    cluster.server.apply(trusted[0].object(&[]));
    cluster.wait_denied(&trusted[0].pod);
    let [exempt, named] = writes();
    // Removes the exemptions of the pod's namespace and link, its addresses, and updates the filter. The pod's name
    // stays.
    assert!(exempt - listed[0] <= 5 && named == listed[1], "{exempt} and {named} after {listed:?}");
    assert!(cluster.reaches(&trusted[1].pod.netns));
    drop(agent);
    cluster.env.unload();
}

#[test]
fn restart_keeps_many_pods_exempt() {
    let cluster = TestCluster::new();
    let agent = start(&cluster);
    let pods = [(); 40].map(|()| {
        let mut pod = schedule(&cluster, PodLink::Routed, Driver::Systemd, TRUSTED);
        pod.start();
        pod
    });
    for pod in &pods {
        cluster.wait_exempt(&pod.pod);
    }
    agent.kill9();
    // Compares counters of maps that survive restarts. A late response would prove nothing; only denials count.
    let (env, stop) = (&cluster.env, StopFlag::default());
    let before = env.status().total;
    thread::scope(|scope| {
        for number in [0, 20, 39] {
            let (pod, stop) = (&pods[number].pod, &stop);
            scope.spawn(move || {
                while !stop.is_set() {
                    env.in_cgroup(|| http_get(&pod.netns, METADATA, SHORT));
                }
            });
        }
        let _stop_on_drop = stop.set_on_drop();
        for _ in 0..scaled(10) {
            let agent = start(&cluster);
            env.status_when("the sandbox of every pod is found", |status| status.has_resolved(40));
            agent.kill9();
        }
    });
    let after = env.status().total;
    assert!(after.exempt.packets > before.exempt.packets, "{after:?}");
    assert_eq!(after.denied.packets, before.denied.packets);
    let agent = start(&cluster);
    cluster.server.delete(&pods[20].uid);
    cluster.wait_denied(&pods[20].pod);
    assert!(cluster.reaches(&pods[39].pod.netns));
    drop(agent);
    cluster.env.unload();
    assert!(cluster.reaches(&pods[20].pod.netns));
}

#[test]
fn late_sandbox_is_found_during_link_churn() {
    let cluster = TestCluster::new();
    // A full resync would find the sandbox as well, so the interval is long.
    let agent =
        cluster.env.agent().config(&cluster.config(RULE)).hooks(&known_here(ALL)).resync(3600).spawn_ready();
    let mut trusted = schedule(&cluster, PodLink::Routed, Driver::Systemd, TRUSTED);
    wait_known(&cluster, 1);
    cluster.wait_denied(&trusted.pod);
    let (node, stop) = (&cluster.env.node, StopFlag::default());
    thread::scope(|scope| {
        let _stop_on_drop = stop.set_on_drop();
        scope.spawn(|| {
            while !stop.is_set() {
                node.ip("link add churn type veth peer name churn1\nlink del churn");
            }
        });
        trusted.start();
        cluster.wait_exempt(&trusted.pod);
    });
    drop(agent);
    cluster.env.unload();
}

/// The kernel reports no address of another network namespace.
#[test]
fn late_address_is_exempt() {
    for link in [PodLink::Routed, PodLink::Bridged] {
        let cluster = TestCluster::new();
        let agent = cluster.env.agent().config(&cluster.config(RULE)).hooks(&known_here(ALL)).resync(1);
        let agent = agent.spawn_ready();
        let mut trusted = schedule(&cluster, link, Driver::Systemd, TRUSTED);
        let netns = &trusted.pod.netns;
        netns.ip(&format!("addr flush dev {}", Pod::IFNAME));
        trusted.cgroup.start_in(netns);
        cluster.env.status_when("the pod is resolved", |status| status.has_resolved(1));
        if link == PodLink::Routed {
            // The routes may depend on the address.
            netns.ip("route flush table main");
            trusted.pod.add_routed_address();
        } else {
            trusted.pod.connect_bridged();
        }
        cluster.wait_exempt(&trusted.pod);
        drop(agent);
        cluster.env.unload();
    }
}

#[test]
fn startup_taint_is_removed_once_enforced() {
    let cluster = TestCluster::new();
    let TestCluster { server, env, .. } = &cluster;
    let pod = env.add_pod(PodLink::Routed);
    env.assert_open(&pod);
    let taint = |key: &str| serde_json::json!({ "key": key, "effect": "NoSchedule" });
    let [other, startup] = ["other", "imds-agent/not-ready"].map(taint);
    server.set_taints(TestCluster::NODE, serde_json::json!([other, startup]));
    // The agent must retry after this failure.
    server.fail(Fault::Status(500, "etcd"));
    server.fail(Fault::Status(500, "etcd"));
    let command = env.agent().config(&cluster.config(""));
    let agent = command.args(&["--startup-taint", "imds-agent/not-ready"]).spawn();
    poll_until(LONG, "the taint to be removed", || {
        (server.taints(TestCluster::NODE) == serde_json::json!([other])).then_some(())
    });
    env.assert_blocked(&pod);
    agent.wait_for_log("removed the taint", LONG);
    drop(agent);
    env.unload();
    env.assert_open(&pod);
}
