//! Kubernetes Events about denied pods and about the node, and the node's condition.

use std::time::{Duration, Instant};

use imds_tests::{
    Agent, AttachMode, METADATA, Pod, PodLink, TestCluster,
    api_server::pod,
    foreign_bpf::detach_link,
    kubelet::{Driver, PodCgroup, new_uid},
    output,
    poll::poll_until,
    probe::{LONG, SHORT, http_get},
    skip_without_tcx,
};
use serde_json::Value;

const NODE: &str = TestCluster::NODE;
const CONDITION: &str = "MetadataProtected";
/// Hooks that work in the network namespace of a test.
const HOOKS: &str = "[hooks]\nsocket = false\nlocal_service = false";

/// A running pod, which the API server lists.
struct RunningPod {
    name: String,
    uid: String,
    _cgroup: PodCgroup,
    pod: Pod,
}

impl RunningPod {
    fn start(cluster: &TestCluster) -> Self {
        let uid = new_uid();
        let mut cgroup = cluster.kubelet.add_pod(&uid, Driver::Systemd);
        let pod = cluster.env.add_pod(PodLink::Routed);
        cgroup.start_in(&pod.netns);
        cluster.server.apply(pod_object(&uid));
        Self { name: format!("pod-{uid}"), uid, _cgroup: cgroup, pod }
    }

    /// Sends a request that must fail.
    fn request(&self) {
        assert!(!http_get(&self.pod.netns, METADATA, SHORT).is_answer());
    }
}

fn pod_object(uid: &str) -> Value {
    pod(uid, NODE, "web", "api", &[("app", "api")])
}

/// Starts an agent with the configuration `top` and these keys of `[kubernetes]`.
fn start<'c>(cluster: &'c TestCluster, top: &str, keys: &str) -> Agent<'c> {
    let config = cluster.config(top) + keys;
    cluster.env.agent().config(&config).hooks(&["from_pod", "node_egress"]).spawn_ready()
}

/// Waits for the only Event with this reason about an object.
#[track_caller]
fn wait_event(cluster: &TestCluster, name: &str, reason: &str) -> Value {
    let events = poll_until(LONG, &format!("an Event {reason} about {name}"), || {
        Some(cluster.server.events_about(name, reason)).filter(|events| !events.is_empty())
    });
    assert_eq!(events.len(), 1, "{events:?}");
    events.into_iter().next().unwrap()
}

#[track_caller]
fn wait_condition(cluster: &TestCluster, status: &str) -> Value {
    poll_until(2 * LONG, &format!("condition {status}"), || {
        cluster.server.condition(NODE, CONDITION).filter(|condition| condition["status"] == status)
    })
}

#[test]
fn denied_pod_gets_one_event() {
    let cluster = TestCluster::new();
    let _agent = start(&cluster, "", "events = true");
    let denied = RunningPod::start(&cluster);
    let start = Instant::now();
    denied.request();
    let event = wait_event(&cluster, &denied.name, "MetadataAccessDenied");
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    assert_eq!(
        (&event["type"], &event["regarding"]["uid"], &event["regarding"]["namespace"]),
        (&"Warning".into(), &denied.uid.as_str().into(), &"web".into())
    );
    let note = event["note"].as_str().unwrap();
    for part in [
        "169.254.169.254",
        "from_pod",
        "namespace = \"web\", service_account = \"api\"",
        "{ \"app\" = \"api\" }",
    ] {
        assert!(note.contains(part), "{note}");
    }
    // Retries within the next minute are not written.
    for _ in 0..3 {
        denied.request();
    }
    poll_until(LONG, "the second denial to be recorded", || {
        let metric = cluster.metric("imds_agent_events_total");
        (metric >= 4).then_some(())
    });
    assert_eq!(cluster.server.event_writes().len(), 1);
    // The metrics get the number with the next resync at the latest.
    poll_until(2 * LONG, "the write to be counted", || {
        (cluster.metric("imds_agent_kubernetes_event_writes_total{result=\"written\"}") == 1).then_some(())
    });
}

#[test]
fn audited_pod_gets_a_normal_event() {
    let cluster = TestCluster::new();
    let _agent = start(&cluster, "mode = 'audit'", "events = true\nnode_condition = true");
    let audited = RunningPod::start(&cluster);
    assert!(http_get(&audited.pod.netns, METADATA, LONG).is_answer());
    let event = wait_event(&cluster, &audited.name, "MetadataAccessAudited");
    assert_eq!(event["type"], "Normal");
    assert_eq!(wait_condition(&cluster, "False")["reason"], "NotEnforcing");
    assert!(cluster.server.events_about(&audited.name, "MetadataAccessDenied").is_empty());
}

#[test]
fn pod_that_is_listed_late_gets_an_event() {
    let cluster = TestCluster::new();
    let _agent = start(&cluster, "", "events = true");
    let (uid, pod) = (new_uid(), cluster.env.add_pod(PodLink::Routed));
    let mut cgroup = cluster.kubelet.add_pod(&uid, Driver::Systemd);
    cgroup.start_in(&pod.netns);
    assert!(!http_get(&pod.netns, METADATA, SHORT).is_answer());
    cluster.server.apply(pod_object(&uid));
    wait_event(&cluster, &format!("pod-{uid}"), "MetadataAccessDenied");
}

#[test]
fn without_the_key_nothing_is_written() {
    let cluster = TestCluster::new();
    let agent = start(&cluster, "", "");
    let denied = RunningPod::start(&cluster);
    denied.request();
    poll_until(LONG, "the denial to be recorded", || {
        (cluster.metric("imds_agent_events_total") > 0).then_some(())
    });
    assert!(cluster.server.event_writes().is_empty() && cluster.server.condition(NODE, CONDITION).is_none());
    drop(agent);
}

#[test]
fn missing_role_is_logged_and_retried() {
    let cluster = TestCluster::new();
    cluster.server.forbid("/apis/events.k8s.io/");
    let agent = start(&cluster, "", "events = true");
    let denied = RunningPod::start(&cluster);
    denied.request();
    agent.wait_for_log("failed to write a Kubernetes Event about pod web/", LONG);
    cluster.server.permit_all();
    let another = RunningPod::start(&cluster);
    another.request();
    wait_event(&cluster, &another.name, "MetadataAccessDenied");
    poll_until(2 * LONG, "the failure to be counted", || {
        (cluster.metric("imds_agent_kubernetes_event_writes_total{result=\"failed\"}") > 0).then_some(())
    });
}

#[test]
fn condition_follows_enforcement() {
    let cluster = TestCluster::new();
    let agent = start(&cluster, "", "events = true\nnode_condition = true");
    let before = wait_condition(&cluster, "True");
    assert_eq!(before["reason"], "Enforced");
    // The condition must end with the enforcement, although the process stays.
    cluster.env.unload();
    let after = wait_condition(&cluster, "False");
    assert_eq!(after["reason"], "NotEnforced");
    let event = wait_event(&cluster, NODE, "MetadataNotEnforced");
    assert!(event["note"].as_str().unwrap().contains("nothing is loaded"), "{event}");
    drop(agent);
    let _agent = start(&cluster, "", "events = true\nnode_condition = true");
    wait_condition(&cluster, "True");
}

#[test]
fn unload_without_agent_ends_the_condition() {
    let cluster = TestCluster::new();
    let agent = start(&cluster, "", "node_condition = true");
    wait_condition(&cluster, "True");
    drop(agent);
    cluster.env.unload();
    let after = wait_condition(&cluster, "False");
    assert!(after["message"].as_str().unwrap().contains("unload"), "{after}");
}

#[test]
fn condition_is_withdrawn_with_its_key() {
    let cluster = TestCluster::new();
    let file = cluster.env.scratch_dir().join("imds.toml");
    let write = |keys: &str| std::fs::write(&file, cluster.config(HOOKS) + keys).unwrap();
    write("node_condition = true");
    let agent = cluster.env.agent().config_file(file.to_str().unwrap()).spawn_ready();
    wait_condition(&cluster, "True");
    write("");
    assert_eq!(wait_condition(&cluster, "False")["reason"], "NotReported");
    drop(agent);
}

#[test]
fn program_before_the_hook_ends_condition() {
    let cluster = TestCluster::new();
    let pod = cluster.env.add_pod(PodLink::Routed);
    let tc = |arguments: &str| {
        let mut tc = cluster.env.node.command("tc");
        tc.args(arguments.split(' '));
        let result = output(tc);
        assert!(result.status.success(), "{arguments}: {result:?}");
    };
    // Accepts each packet before the agent's filter, which gets the same priority.
    let device = &pod.host_ifname;
    tc(&format!("qdisc add dev {device} clsact"));
    tc(&format!("filter add dev {device} ingress pref 1 protocol ip u32 match u32 0 0 flowid 1:1"));
    let file = cluster.env.scratch_dir().join("imds.toml");
    let hooks = "[hooks]\nsocket = false\nnode_egress = false\nlocal_service = false";
    std::fs::write(&file, cluster.config(hooks) + "node_condition = true").unwrap();
    let command = cluster.env.agent().config_file(file.to_str().unwrap()).backend(AttachMode::Clsact);
    let _agent = command.spawn_degraded("from_pod is not first");
    let condition = wait_condition(&cluster, "False");
    assert!(condition["message"].as_str().unwrap().contains("from_pod is not first"), "{condition}");
    assert!(http_get(&pod.netns, METADATA, LONG).is_answer());
    tc(&format!("filter del dev {device} ingress pref 1 protocol ip u32"));
    wait_condition(&cluster, "True");
    cluster.env.assert_blocked(&pod);
}

#[test]
fn renewed_credentials_are_used() {
    let cluster = TestCluster::new();
    let _agent = start(&cluster, "", "events = true");
    let denied = RunningPod::start(&cluster);
    denied.request();
    wait_event(&cluster, &denied.name, "MetadataAccessDenied");
    let another = RunningPod::start(&cluster);
    cluster.server.set_token("renewed");
    cluster.server.write_kubeconfig(&cluster.env.scratch_dir().join("kubeconfig"));
    another.request();
    wait_event(&cluster, &another.name, "MetadataAccessDenied");
}

#[test]
fn removed_program_is_reported_on_the_node() {
    if skip_without_tcx() {
        return;
    }
    let cluster = TestCluster::new();
    let _agent = start(&cluster, "", "events = true");
    let pod = cluster.env.add_pod(PodLink::Routed);
    cluster.env.status_when("from_pod is attached", |status| {
        let hook = status.find(&pod.host_ifname).and_then(|interface| interface.attachment("from_pod"));
        hook.is_some_and(|attachment| attachment.attach_mode.is_some())
    });
    // The agent writes an Event again if the answer is lost, under the same name.
    cluster.server.lose_event_answers(1);
    detach_link(&cluster.env.pin_dir().join(format!("links/from_pod_{}", pod.host_ifindex)));
    let event = wait_event(&cluster, NODE, "MetadataProtectionRepaired");
    poll_until(2 * LONG, "the Event to be written again", || {
        (cluster.server.event_writes().len() >= 2).then_some(())
    });
    assert_eq!(cluster.server.events_about(NODE, "MetadataProtectionRepaired").len(), 1);
    assert_eq!(event["regarding"]["uid"], NODE);
    assert!(event["note"].as_str().unwrap().contains("1 attached again"), "{event}");
}

#[test]
fn many_denied_pods_cause_few_writes() {
    let cluster = TestCluster::new();
    let _agent = start(&cluster, "", "events = true");
    let pods: Vec<_> = (0..20).map(|_| RunningPod::start(&cluster)).collect();
    for pod in &pods {
        cluster.env.status_when("the pod has a name", |status| {
            status
                .interfaces
                .iter()
                .any(|interface| interface.ifindex == pod.pod.host_ifindex && interface.pod.is_some())
        });
    }
    for pod in &pods {
        http_get(&pod.pod.netns, METADATA, Duration::from_millis(1));
    }
    // The agent can read the denials in several steps.
    poll_until(LONG, "all denials to be recorded", || {
        (cluster.metric("imds_agent_events_total") >= 20).then_some(())
    });
    poll_until(3 * LONG, "the writes", || (cluster.server.event_writes().len() >= 8).then_some(()));
    assert_eq!(cluster.server.event_writes().len(), 8, "{:#?}", cluster.server.event_writes());
}
