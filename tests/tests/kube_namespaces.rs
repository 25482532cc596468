//! Exemptions by the labels of namespaces, from the API server's events to the packets.

use imds_tests::{
    Agent, ConfigFile, Pod, PodLink, Status, TestCluster,
    api_server::{Fault, namespace, pod},
    http::{DEFAULT, try_get},
    known_here,
    kubelet::{Driver, PodCgroup, new_uid},
    lacks_netns_cookie,
    poll::poll_until,
    probe::LONG,
    status::Namespaces,
};
use serde_json::Value;

const HOOKS: &[&str] = &["from_pod", "node_egress", "socket"];
const GRANTED: &[(&str, &str)] = &[("imds-agent/exempt", "true")];
const RULE: &str = "
    [[exempt]]
    name = 'platform'
    namespace_selector = { match_labels = { 'imds-agent/exempt' = 'true' } }
    service_account = 'agent'\n";
/// Matches all namespaces without the label.
const NEGATIVE: &str = "
    [[exempt]]
    name = 'others'
    namespace_selector = { match_expressions = [{ key = 'imds-agent/exempt', operator = 'DoesNotExist' }] }\n";
const BY_NAME: &str = "
    [[exempt]]
    name = 'system'
    namespace = 'kube-system'\n";
const FORBIDDEN: &str = "needs a ClusterRole that allows list and watch of namespaces";

/// A pod with a process.
struct Started {
    uid: String,
    pod: Pod,
    _cgroup: PodCgroup,
}

fn start_pod(cluster: &TestCluster, namespace: &str, account: &str) -> Started {
    let uid = new_uid();
    let mut cgroup = cluster.kubelet.add_pod(&uid, Driver::Systemd);
    let started = cluster.env.add_pod(PodLink::Routed);
    cgroup.start_in(&started.netns);
    cluster.server.apply(pod(&uid, TestCluster::NODE, namespace, account, &[]));
    Started { uid, pod: started, _cgroup: cgroup }
}

fn start<'c>(cluster: &'c TestCluster, rules: &str) -> Agent<'c> {
    cluster.env.agent().config(&cluster.config(rules)).hooks(&known_here(HOOKS)).spawn_ready()
}

/// Returns a configuration file with these rules.
fn file_with(cluster: &TestCluster, rules: &str) -> String {
    let hooks = if lacks_netns_cookie() { "[hooks]\nsocket = false\n" } else { "" };
    format!("{}\n{hooks}", cluster.config(rules))
}

fn namespaces(status: &Status) -> Option<&Namespaces> {
    status.kubernetes.as_ref()?.namespaces.as_ref()
}

fn wait_namespaces(cluster: &TestCluster, what: &str, is_so: impl Fn(&Namespaces) -> bool) -> Status {
    cluster.env.status_when(what, |status| namespaces(status).is_some_and(&is_so))
}

fn wait_synced(cluster: &TestCluster, known: u32) -> Status {
    wait_namespaces(cluster, "the namespaces are known", |state| state.connected && state.known == known)
}

/// Returns the requests for namespaces.
fn requests(cluster: &TestCluster) -> Vec<String> {
    let all = cluster.server.requests().into_iter();
    all.filter(|target| target.starts_with("/api/v1/namespaces")).collect()
}

/// Asserts that the documentation has each metric, and each field of the status of the watches.
fn assert_documented(cluster: &TestCluster) {
    let (_, metrics) = try_get(&cluster.env, DEFAULT, "/metrics").unwrap();
    let names: Vec<_> =
        metrics.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
    assert!(names.contains(&"imds_agent_kubernetes_namespaces"), "{names:?}");
    for name in names {
        assert!(include_str!("../../docs/metrics.md").contains(&format!("`{name}`")), "{name}");
    }
    let output = cluster.env.imds_agent(&["status", "-o", "json"]).output();
    let status: Value = serde_json::from_slice(&output.stdout).unwrap();
    let (watch, namespaces) = (&status["kubernetes"], &status["kubernetes"]["namespaces"]);
    let fields = [watch, namespaces].map(|object| object.as_object().unwrap());
    for field in fields.into_iter().flat_map(|object| object.keys()) {
        assert!(include_str!("../../docs/json.md").contains(&format!("`{field}`")), "{field}");
    }
}

#[test]
fn exemption_follows_namespace_label() {
    let cluster = TestCluster::new();
    let server = &cluster.server;
    server.apply(namespace("team", &[]));
    server.apply(namespace("other", GRANTED));
    // Without a resync, only the watch can report the changes.
    let agent = cluster.env.agent().config(&cluster.config(RULE)).hooks(&known_here(HOOKS)).resync(3600);
    let agent = agent.spawn_ready();
    let member = start_pod(&cluster, "team", "agent");
    let of_other_account = start_pod(&cluster, "team", "default");
    cluster.env.status_when("the pods are resolved", |status| status.has_resolved(2));
    wait_synced(&cluster, 2);
    cluster.wait_denied(&member.pod);

    for _ in 0..2 {
        server.apply(namespace("team", GRANTED));
        cluster.wait_exempt(&member.pod);
        cluster.wait_denied(&of_other_account.pod);
        server.apply(namespace("team", &[("imds-agent/exempt", "false")]));
        cluster.wait_denied(&member.pod);
    }
    server.apply(namespace("team", GRANTED));
    cluster.wait_exempt(&member.pod);
    assert_eq!(cluster.metric("imds_agent_kubernetes_namespaces_connected"), 1);
    assert_eq!(cluster.metric("imds_agent_kubernetes_namespaces"), 2);
    assert_documented(&cluster);
    server.delete("team");
    cluster.wait_denied(&member.pod);
    wait_synced(&cluster, 1);
    cluster.env.status_when("no sender is exempt", |status| status.exemptions.is_empty());

    // One list and one watch: the events cause no further requests.
    let requests = requests(&cluster);
    let is_watch = |target: &String| target.contains("watch=true");
    assert!(matches!(&requests[..], [list, watch] if !is_watch(list) && is_watch(watch)), "{requests:?}");
    // The rest of a namespace is not transferred.
    for kind in ["PartialObjectMetadataList", "PartialObjectMetadata"] {
        let types = format!("application/json;as={kind};g=meta.k8s.io;v=v1,application/json");
        assert_eq!(server.header_values("accept").iter().filter(|found| **found == types).count(), 1);
    }
    drop(agent);
    cluster.env.unload();
    assert!(cluster.reaches(&member.pod.netns));
}

#[test]
fn unknown_namespace_is_never_exempt() {
    let cluster = TestCluster::new();
    cluster.server.apply(namespace("plain", &[]));
    cluster.server.apply(namespace("granted", GRANTED));
    let agent = start(&cluster, NEGATIVE);
    let (plain, granted) = (start_pod(&cluster, "plain", "a"), start_pod(&cluster, "granted", "a"));
    let unknown = start_pod(&cluster, "unknown", "a");
    cluster.env.status_when("the pods are resolved", |status| status.has_resolved(3));
    cluster.wait_exempt(&plain.pod);
    cluster.assert_denied(&granted.pod.netns);
    cluster.assert_denied(&unknown.pod.netns);
    cluster.server.apply(namespace("unknown", &[]));
    cluster.wait_exempt(&unknown.pod);
    drop(agent);
    cluster.env.unload();
}

#[test]
fn reload_starts_and_stops_the_watch() {
    let cluster = TestCluster::new();
    cluster.server.apply(namespace("team", &[("imds-agent/exempt", "true"), ("tier", "x")]));
    let file = ConfigFile::new(&cluster.env, &file_with(&cluster, BY_NAME));
    let agent = file.agent().spawn_ready();
    let (member, system) =
        (start_pod(&cluster, "team", "agent"), start_pod(&cluster, "kube-system", "agent"));
    cluster.wait_exempt(&system.pod);
    cluster.assert_denied(&member.pod.netns);
    assert!(requests(&cluster).is_empty() && namespaces(&cluster.env.status()).is_none());

    file.reload(&file_with(&cluster, &format!("{BY_NAME}{RULE}")));
    cluster.wait_exempt(&member.pod);
    wait_synced(&cluster, 1);
    // A selector of another label needs another list, which does not interrupt the exemption.
    let other = RULE.replace("platform", "tier").replace("imds-agent/exempt", "tier").replace("true", "x");
    let denied = cluster.env.status().total.denied.packets;
    file.reload(&file_with(&cluster, &format!("{BY_NAME}{RULE}{other}")));
    assert!(cluster.reaches(&member.pod.netns));
    poll_until(LONG, "a second list", || (requests(&cluster).len() >= 4).then_some(()));
    assert!(cluster.reaches(&member.pod.netns));
    assert_eq!(cluster.env.status().total.denied.packets, denied);
    // A reload that changes no label starts no other watch.
    let before = requests(&cluster).len();
    file.reload(&file_with(&cluster, &format!("{other}{RULE}{BY_NAME}")));
    assert!(cluster.reaches(&member.pod.netns));

    file.reload(&file_with(&cluster, BY_NAME));
    cluster.wait_denied(&member.pod);
    assert!(cluster.reaches(&system.pod.netns));
    cluster.env.status_when("the watch has stopped", |status| namespaces(status).is_none());
    assert_eq!(requests(&cluster).len(), before);
    drop(agent);
    cluster.env.unload();
}

#[test]
fn forbidden_namespaces_leave_other_rules() {
    let cluster = TestCluster::new();
    cluster.server.apply(namespace("team", GRANTED));
    cluster.server.forbid("/api/v1/namespaces?");
    let file = ConfigFile::new(&cluster.env, &file_with(&cluster, &format!("{RULE}{BY_NAME}")));
    let agent = file.agent().spawn_degraded(FORBIDDEN);
    let (member, system) =
        (start_pod(&cluster, "team", "agent"), start_pod(&cluster, "kube-system", "agent"));
    cluster.wait_exempt(&system.pod);
    cluster.assert_denied(&member.pod.netns);
    let status = wait_namespaces(&cluster, "the error is reported", |state| state.error.is_some());
    let state = namespaces(&status).unwrap();
    let error = state.error.as_deref().unwrap();
    assert!(!state.connected && error.contains("/api/v1/namespaces") && error.contains(FORBIDDEN), "{error}");
    let kubernetes = status.kubernetes.as_ref().unwrap();
    assert!(kubernetes.connected && kubernetes.error.is_none() && kubernetes.pods == 2, "{kubernetes:?}");
    let problem = status.problems.iter().find(|problem| problem.problem.contains(FORBIDDEN)).unwrap();
    assert!(problem.problem.contains("platform"), "{problem:?}");
    let table = cluster.env.imds_agent(&["status"]).output();
    let table = String::from_utf8(table.stdout).unwrap();
    assert!(table.contains("0 namespaces known, not connected: "), "{table}");
    assert_eq!(cluster.metric("imds_agent_kubernetes_namespaces_connected"), 0);
    assert_eq!(cluster.metric("imds_agent_kubernetes_connected"), 1);
    assert!(cluster.metric("imds_agent_kubernetes_namespace_errors_total{kind=\"forbidden\"}") >= 1);

    cluster.server.permit_all();
    cluster.wait_exempt(&member.pod);
    wait_synced(&cluster, 1);
    cluster.env.status_when("no problem is left", |status| status.problems.is_empty());
    // Once the right is withdrawn, known labels count, but the operator sees that they may be outdated.
    cluster.server.forbid("/api/v1/namespaces?");
    cluster.server.disconnect();
    cluster.env.status_when("the error is reported again", |status| {
        status.problems.iter().any(|problem| problem.problem.contains(FORBIDDEN))
    });
    assert!(cluster.reaches(&member.pod.netns) && cluster.reaches(&system.pod.netns));
    cluster.server.delete(&member.uid);
    cluster.wait_denied(&member.pod);
    drop(agent);
    cluster.env.unload();
}

#[test]
fn restart_keeps_namespace_exemptions() {
    let cluster = TestCluster::new();
    cluster.server.apply(namespace("team", GRANTED));
    let file = ConfigFile::new(&cluster.env, &file_with(&cluster, RULE));
    let agent = file.agent().spawn_ready();
    let member = start_pod(&cluster, "team", "agent");
    cluster.wait_exempt(&member.pod);
    agent.kill9();
    // The next agent learns of the pods only.
    cluster.server.forbid("/api/v1/namespaces?");
    let agent = file.agent().spawn_degraded(FORBIDDEN);
    cluster.env.status_when("the pods are resolved", |status| status.has_resolved(1));
    assert!(cluster.reaches(&member.pod.netns), "{}", agent.log());
    let later = start_pod(&cluster, "team", "agent");
    cluster.env.status_when("the later pod is resolved", |status| status.has_resolved(2));
    cluster.assert_denied(&later.pod.netns);
    cluster.server.permit_all();
    cluster.wait_exempt(&later.pod);
    assert!(cluster.reaches(&member.pod.netns));
    agent.kill9();
    // The namespace was deleted while no agent ran.
    cluster.server.delete("team");
    let agent = file.agent().spawn_ready();
    cluster.wait_denied(&member.pod);
    cluster.assert_denied(&later.pod.netns);
    drop(agent);
    cluster.env.unload();
}

#[test]
fn outage_keeps_known_labels() {
    let cluster = TestCluster::new();
    cluster.server.apply(namespace("team", GRANTED));
    let agent = start(&cluster, RULE);
    let member = start_pod(&cluster, "team", "agent");
    cluster.wait_exempt(&member.pod);
    wait_synced(&cluster, 1);
    cluster.server.fail(Fault::Close);
    cluster.server.disconnect();
    wait_namespaces(&cluster, "the outage is noticed", |state| !state.connected && state.error.is_some());
    assert!(cluster.reaches(&member.pod.netns));
    // The history of both kinds is lost: each watch lists again.
    cluster.server.forget("team");
    cluster.server.disconnect();
    // The delays between attempts add up.
    poll_until(4 * LONG, "the second list", || {
        let status = cluster.env.status();
        namespaces(&status).is_some_and(|state| state.connected && state.known == 0).then_some(())
    });
    cluster.wait_denied(&member.pod);
    drop(agent);
    cluster.env.unload();
}

#[test]
fn many_namespaces_take_little_memory() {
    const NAMESPACES: u32 = 5000;
    let memory = |cluster: &TestCluster| cluster.metric("process_resident_memory_bytes");
    let cluster = TestCluster::new();
    let agent = start(&cluster, RULE);
    wait_synced(&cluster, 0);
    let before = memory(&cluster);
    drop(agent);
    for number in 0..NAMESPACES {
        let name = format!("tenant-{number:05}-production");
        let mut labels = vec![("imds-agent/exempt", "true"), ("field.cattle.io/projectId", "p-0123456789")];
        labels.extend([
            ("pod-security.kubernetes.io/enforce", "restricted"),
            ("argocd.argoproj.io/instance", &name),
        ]);
        cluster.server.apply(namespace(&name, &labels));
    }
    let agent = start(&cluster, RULE);
    wait_synced(&cluster, NAMESPACES);
    // The agent returns the memory of the list after a moment.
    poll_until(LONG, "the memory to grow by less than 2 MiB", || {
        (memory(&cluster).saturating_sub(before) < 2 << 20).then_some(())
    });
    drop(agent);
    cluster.env.unload();
}
