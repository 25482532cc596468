//! The CNI plugin `bandwidth`, which adds an `ingress` qdisc to a link that another plugin has just created.

use std::{
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use imds_tests::{
    Agent, AgentCommand, AttachMode, CniNetwork, CniPod, METADATA, Netns, SERVICE, StopFlag, TestEnv,
    WHOLE_TEST,
    cni::plugin,
    hook::{self, qdisc_kinds},
    known_here, lacks_program,
    poll::poll_until,
    probe::{http_get, reachable},
    skip_without_tcx,
};
use serde_json::{Value, json};

use crate::{
    ALL, exemption,
    nics::{lacks_macvlan, nic_bridge},
    plugins::{bridge, ptp, send_until},
    reaches, reaches_somehow,
};

/// Seconds for which the agent leaves a new link to the CNI in clsact mode. This is the default, which other tests
/// override.
const CLSACT_DELAY: &str = "5";
/// Delay in seconds that exceeds the duration of any test.
const LONG_CLSACT_DELAY: &str = "600";
/// Time limit until the agent is attached to all links.
const ATTACHED: Duration = Duration::from_secs(30);
/// Number of pods that start concurrently, as with a kubelet.
const WORKERS: u32 = 4;

fn bandwidth() -> Value {
    // 80 Mbit/s, which no probe reaches.
    let (rate, burst) = (80_000_000, 8_000_000);
    json!({
        "type": "bandwidth",
        "ingressRate": rate, "ingressBurst": burst,
        "egressRate": rate, "egressBurst": burst,
    })
}

/// Attach mode of the agent, or `None` for its own choice.
type Mode = Option<AttachMode>;

/// Selects pod interfaces by name. Without it, the agent also adds an egress filter to interfaces that may be an uplink,
/// for which an `ingress` qdisc has no place.
const PODS: &str = "[interfaces]\ninclude = ['veth*']\n";
/// Configurations with and without [`PODS`].
const WITH_AND_WITHOUT_PODS: [&str; 2] = [PODS, ""];

fn agent<'w>(env: &'w TestEnv, mode: Mode, config: &str, delay: &str) -> AgentCommand<'w> {
    let agent = env.agent().hooks(&known_here(ALL)).config(config).args(&["--clsact-delay", delay]);
    match mode {
        // `AgentCommand::backend` also sets the delay.
        Some(mode) => agent.args(&["--tc-backend", mode.name()]),
        None => agent,
    }
}

fn start<'w>(env: &'w TestEnv, mode: Mode, config: &str) -> Agent<'w> {
    let agent = agent(env, mode, config, CLSACT_DELAY);
    if mode == Some(AttachMode::Clsact) { spawn(env, agent) } else { agent.spawn_ready() }
}

/// Starts an agent and waits until the hooks that deny every pod of the node are attached, `node_egress` on each uplink.
fn spawn<'w>(env: &TestEnv, agent: AgentCommand<'w>) -> Agent<'w> {
    let agent = agent.spawn();
    poll_until(ATTACHED, "the hooks of the node", || {
        let status = env.try_status().ok()?;
        let mut uplinks = status.interfaces.iter().filter(|interface| interface.role == "uplink").peekable();
        let is_attached = uplinks.peek().is_some()
            && uplinks.all(|uplink| status.has_attached(&uplink.name, "node_egress"));
        (is_attached && status.sockets.is_none_or(|sockets| sockets.attached)).then_some(())
    });
    agent
}

/// Asserts that `from_pod` is attached to the pod interfaces, and that its order is reported. The plugin's own filter
/// has the first priority of an `ingress` qdisc, so that a filter of the agent comes second.
#[track_caller]
fn assert_attached(env: &TestEnv, mode: Mode, pods: &[&CniPod<'_>]) {
    let is_clsact = mode == Some(AttachMode::Clsact);
    poll_until(ATTACHED, "from_pod on every pod's link", || {
        let status = env.status();
        let is_reported = |pod: &CniPod<'_>| {
            status.problems.iter().any(|problem| problem.interface.as_deref() == Some(pod.veth()))
        };
        let is_done =
            |pod: &&CniPod<'_>| status.has_attached(pod.veth(), "from_pod") && is_reported(pod) == is_clsact;
        (pods.iter().all(is_done) && status.is_ready() != is_clsact).then_some(())
    });
}

/// Waits until the agent leaves the pod's link to its CNI plugins. A process that starts after that is the pod's first
/// process after its plugins.
#[track_caller]
fn wait_delayed(agent: &Agent<'_>, pod: &CniPod<'_>) {
    agent.wait_for_log(&format!("for the CNI plugins of {} ", pod.veth()), ATTACHED);
}

/// Starts a process in the pod, which ends with the network namespace. Like a container's process and unlike a plugin's,
/// it has its own mount namespace.
#[track_caller]
fn start_process(netns: &Netns) {
    let shell = ["--mount", "sh", "-c", "sleep 1000 >/dev/null 2>&1 &"];
    assert!(netns.command("unshare").args(shell).status().is_ok_and(|status| status.success()));
}

/// Connects a pod whose first process is older than its link, as with cri-dockerd.
fn connect_started<'n>(network: &'n CniNetwork<'_>) -> Result<CniPod<'n>, String> {
    let netns = Arc::new(Netns::new("cni"));
    start_process(&netns);
    network.connect(netns)
}

/// Connects a pod that sends to the endpoint continuously.
fn connect<'n>(network: &'n CniNetwork<'_>) -> Result<CniPod<'n>, String> {
    let (netns, stop) = (Arc::new(Netns::new("cni")), StopFlag::default());
    thread::scope(|scope| {
        let _stop_on_drop = stop.set_on_drop();
        scope.spawn(|| send_until(&netns, &stop));
        let pod = network.connect(Arc::clone(&netns))?;
        if !reachable(&pod.netns, SERVICE) {
            return Err(format!("{} does not reach other services", pod.address));
        }
        Ok(pod)
    })
}

#[track_caller]
fn assert_qdiscs_of_plugin(env: &TestEnv, pod: &CniPod<'_>) {
    assert_eq!(qdisc_kinds(&env.node, pod.veth()), ["ingress", "tbf"], "{}", pod.veth());
}

/// Creates a network whose pods get the chained plugins.
type MakeNetwork = for<'w> fn(&'w TestEnv, &[Value]) -> CniNetwork<'w>;

/// Starts this number of pods while the agent runs, asserts that none fails and no packet arrives, and unloads the
/// agent. Every second pod has a process before its link.
fn assert_pods_start(make: MakeNetwork, mode: Mode, config: &str, count: u32) {
    if lacks_program(WHOLE_TEST, &[&plugin("bandwidth"), "iptables"])
        || (mode == Some(AttachMode::Tcx) && skip_without_tcx())
    {
        return;
    }
    let env = TestEnv::new();
    let network = make(&env, &[bandwidth()]);
    let before = network.add_pod();
    assert!(reaches(&env, &before.netns));
    assert_qdiscs_of_plugin(&env, &before);

    let agent = start(&env, mode, config);
    let (pods, failures) = (Mutex::new(Vec::new()), Mutex::new(Vec::new()));
    env.assert_nothing_arrives(|| {
        thread::scope(|scope| {
            for worker in 0..WORKERS {
                let (network, pods, failures) = (&network, &pods, &failures);
                scope.spawn(move || {
                    let connect = if worker.is_multiple_of(2) { connect } else { connect_started };
                    for _ in (worker..count).step_by(WORKERS as usize) {
                        match connect(network) {
                            Ok(pod) => pods.lock().expect("no panic").push(pod),
                            Err(failure) => failures.lock().expect("no panic").push(failure),
                        }
                    }
                });
            }
        });
    });
    let (pods, failures) = (pods.into_inner().expect("no panic"), failures.into_inner().expect("no panic"));
    assert!(failures.is_empty(), "{} of {count} pods failed: {failures:#?}", failures.len());

    assert_attached(&env, mode, &pods.iter().chain([&before]).collect::<Vec<_>>());
    for pod in pods.iter().chain([&before]) {
        assert_qdiscs_of_plugin(&env, pod);
        env.assert_nothing_arrives(|| {
            // The process is outside of the socket hook's cgroup, so that packets are sent.
            assert!(!http_get(&pod.netns, METADATA, Duration::from_millis(50)).is_answer());
        });
    }
    if mode != Some(AttachMode::Clsact) {
        let status = env.status();
        for pod in &pods {
            assert!(status.interface(pod.veth()).counts.denied.packets > 0, "{}", pod.veth());
        }
    }

    // Half of the pods are deleted while the agent runs.
    let mut pods = pods;
    pods.drain(..pods.len() / 2).for_each(CniPod::delete);
    drop(agent);
    env.unload();
    for pod in pods.iter().chain([&before]) {
        assert_qdiscs_of_plugin(&env, pod);
        assert!(!hook::programs(&env.node, pod.veth()).iter().any(hook::Attached::is_ours));
        assert!(reachable(&pod.netns, METADATA), "{}", pod.veth());
    }
    pods.into_iter().chain([before]).for_each(CniPod::delete);
}

/// Number of pods in tests that are not about scale.
const FEW: u32 = 6;
const MANY: u32 = 50;

#[test]
fn tcx_with_ptp_pods() {
    assert_pods_start(ptp, Some(AttachMode::Tcx), "", FEW);
}

#[test]
fn tcx_with_bridge_pods() {
    assert_pods_start(bridge, Some(AttachMode::Tcx), "", FEW);
}

#[test]
fn default_mode_with_ptp_pods() {
    assert_pods_start(ptp, None, "", FEW);
}

#[test]
fn default_mode_with_bridge_pods() {
    assert_pods_start(bridge, None, "", FEW);
}

#[test]
fn clsact_with_ptp_pods() {
    for config in WITH_AND_WITHOUT_PODS {
        assert_pods_start(ptp, Some(AttachMode::Clsact), config, FEW);
    }
}

#[test]
fn clsact_with_bridge_pods() {
    for config in WITH_AND_WITHOUT_PODS {
        assert_pods_start(bridge, Some(AttachMode::Clsact), config, FEW);
    }
}

/// A provider with the endpoint `fe80::a9fe:a9fe`: each link with IPv6 has a route to all link-local addresses.
const LINK_LOCAL_ENDPOINT: &str = "provider = 'hetzner'\n";

#[test]
fn clsact_with_ptp_pods_and_a_link_local_endpoint() {
    assert_pods_start(ptp, Some(AttachMode::Clsact), &format!("{LINK_LOCAL_ENDPOINT}{PODS}"), FEW);
}

#[test]
fn clsact_with_bridge_pods_and_a_link_local_endpoint() {
    assert_pods_start(bridge, Some(AttachMode::Clsact), &format!("{LINK_LOCAL_ENDPOINT}{PODS}"), FEW);
}

#[test]
fn clsact_with_pods_on_the_bridge_of_the_nic() {
    if !lacks_macvlan() {
        assert_pods_start(nic_bridge, Some(AttachMode::Clsact), PODS, FEW);
    }
}

#[test]
#[ignore = "takes long: cargo xtask e2e real"]
fn fifty_pods_in_each_mode() {
    let clsact = WITH_AND_WITHOUT_PODS.map(|config| (Some(AttachMode::Clsact), config));
    for (mode, config) in [(None, "")].into_iter().chain(clsact) {
        for make in [ptp, bridge] {
            assert_pods_start(make, mode, config, imds_tests::scaled(MANY));
        }
    }
}

/// The agent adds its qdisc to a new link once the pod's first process starts, because the CNI has then set up the link.
#[test]
fn clsact_waits_for_a_process() {
    if lacks_program(WHOLE_TEST, &[&plugin("ptp"), "iptables"]) {
        return;
    }
    let env = TestEnv::new();
    let network = ptp(&env, &[]);
    let before = network.add_pod();
    assert!(reaches(&env, &before.netns));
    before.delete();
    let command = agent(&env, Some(AttachMode::Clsact), PODS, LONG_CLSACT_DELAY);
    let agent = spawn(&env, command.args(&["--log-level", "debug"]));
    let pod = env.assert_nothing_arrives(|| connect(&network)).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(qdisc_kinds(&env.node, pod.veth()), ["noqueue"]);

    wait_delayed(&agent, &pod);
    start_process(&pod.netns);
    poll_until(ATTACHED, "from_pod on the new link", || {
        env.status().has_attached(pod.veth(), "from_pod").then_some(())
    });
    assert_eq!(qdisc_kinds(&env.node, pod.veth()), ["clsact", "noqueue"]);
    env.assert_nothing_arrives(|| assert!(!reaches_somehow(&env, &pod.netns)));
    drop(agent);
    env.unload();
    assert_eq!(qdisc_kinds(&env.node, pod.veth()), ["noqueue"]);
    assert!(reaches(&env, &pod.netns));
}

/// A process that is older than the pod's link does not show that the CNI has set up the link. The agent waits only if
/// another hook denies the pod's packets.
#[test]
fn clsact_ignores_earlier_processes() {
    if lacks_program(WHOLE_TEST, &[&plugin("bridge"), "iptables"]) {
        return;
    }
    for make in [ptp, bridge] {
        let env = TestEnv::new();
        let network = make(&env, &[]);
        let connect_started = || connect_started(&network).unwrap_or_else(|error| panic!("{error}"));
        let wait_attached = |pod: &CniPod<'_>| {
            poll_until(ATTACHED, "from_pod on the new link", || {
                env.status().has_attached(pod.veth(), "from_pod").then_some(())
            });
        };
        let command = || agent(&env, Some(AttachMode::Clsact), PODS, LONG_CLSACT_DELAY);
        let agent = spawn(&env, command().args(&["--log-level", "debug"]));
        let early = connect_started();
        let later = network.add_pod();
        wait_delayed(&agent, &later);
        start_process(&later.netns);
        wait_attached(&later);
        assert_eq!(qdisc_kinds(&env.node, early.veth()), ["noqueue"]);
        env.assert_nothing_arrives(|| assert!(!reaches_somehow(&env, &early.netns)));
        drop(agent);
        env.unload();
        assert!(reaches(&env, &early.netns));

        let agent = command().hooks(&["from_pod"]).spawn();
        // Links that exist at the start do not wait either.
        wait_attached(&early);
        wait_attached(&connect_started());
        drop(agent);
        env.unload();
    }
}

/// The agent adds no qdisc in TCX mode.
#[test]
fn tcx_adds_no_qdisc() {
    if lacks_program(WHOLE_TEST, &[&plugin("ptp"), "iptables"]) || skip_without_tcx() {
        return;
    }
    let env = TestEnv::new();
    let network = ptp(&env, &[]);
    let qdiscs = |pod: &CniPod<'_>| qdisc_kinds(&env.node, pod.veth());
    let before = network.add_pod();
    let agent = start(&env, Some(AttachMode::Tcx), "");
    let later = network.add_pod();
    poll_until(ATTACHED, "from_pod on the new link", || {
        assert_eq!([qdiscs(&before), qdiscs(&later)], [["noqueue"], ["noqueue"]]);
        env.status().has_attached(later.veth(), "from_pod").then_some(())
    });
    assert_eq!(qdiscs(&later), ["noqueue"]);
    for pod in [&before, &later] {
        env.assert_nothing_arrives(|| assert!(!reaches_somehow(&env, &pod.netns)));
    }
    drop(agent);
    env.unload();
    assert!(reaches(&env, &later.netns));
}

/// A bandwidth limit of an exempt pod does not affect its exemption.
#[test]
fn exempt_pod_with_limited_bandwidth() {
    if lacks_program(WHOLE_TEST, &[&plugin("bandwidth"), "iptables"]) {
        return;
    }
    let clsact = WITH_AND_WITHOUT_PODS.map(|config| (Some(AttachMode::Clsact), config));
    for (mode, config) in [(None, "")].into_iter().chain(clsact) {
        let env = TestEnv::new();
        let network = ptp(&env, &[bandwidth()]);
        let [exempt, other] = [network.add_pod(), network.add_pod()];
        assert!(reaches(&env, &exempt.netns) && reaches(&env, &other.netns));
        let exemption = exemption(&format!("interface = '{}'", exempt.veth()));
        let agent = start(&env, mode, &format!("{config}{exemption}"));
        assert_attached(&env, mode, &[&exempt, &other]);
        assert!(reaches(&env, &env.node));
        assert!(reaches(&env, &exempt.netns), "the exempt pod is denied with {mode:?}");
        env.assert_nothing_arrives(|| assert!(!reaches_somehow(&env, &other.netns)));
        drop(agent);
        env.unload();
        assert!(reaches(&env, &other.netns));
        for pod in [exempt, other] {
            assert_qdiscs_of_plugin(&env, &pod);
            pod.delete();
        }
    }
}
