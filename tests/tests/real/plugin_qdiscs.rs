//! Qdiscs that `tc` added before the agent started.

use std::time::Duration;

use aya::programs::tc::TcAttachType;
use imds_tests::{
    AttachMode, METADATA, Pod, PodLink, TestEnv,
    doctor::{assert_has, doctor_report, one},
    hook::{self, qdisc_kinds},
    poll::{poll_until, try_poll},
    probe::{LONG, SHORT, http_get, udp_echo},
    with_each_backend,
};

use crate::run;

/// Duration in which an agent that repeats a repair is detected.
const WATCHED: Duration = Duration::from_secs(3);
/// Exceeds the number of log lines of an agent that reports each state once.
const MAX_LINES: usize = 60;
/// Exit code of `status` if something is not enforced.
const NOT_ENFORCED: i32 = 3;

fn is_open(pod: &Pod) -> bool {
    http_get(&pod.netns, METADATA, SHORT).is_answer() || udp_echo(&pod.netns, METADATA, SHORT).is_answer()
}

/// Reports whether the pod gets a response, also on a busy machine.
fn reaches_in_time(pod: &Pod) -> bool {
    try_poll(LONG, || is_open(pod).then_some(())).is_some()
}

fn has_ours(env: &TestEnv, interface: &str, at: TcAttachType) -> bool {
    hook::programs_at(&env.node, interface, at).iter().any(hook::Attached::is_ours)
}

fn has_u32_filter(env: &TestEnv, interface: &str) -> bool {
    let filters = run(&env.node, &format!("tc filter show dev {interface} parent ffff:"));
    filters.contains("u32")
}

/// `node_egress` is enforced behind an `ingress` qdisc of the uplink, or reported as not enforced.
#[test]
fn ingress_qdisc_on_the_uplink() {
    with_each_backend(|mode| {
        let env = TestEnv::new();
        let pods = [PodLink::Routed, PodLink::Bridged].map(|link| env.add_pod(link));
        run(&env.node, &format!("tc qdisc add dev {} ingress", TestEnv::UPLINK));
        assert!(pods.iter().all(reaches_in_time));
        let agent = env.agent().backend(mode).hooks(&["node_egress"]).resync(1).spawn();
        poll_until(LONG, "the agent to have synced", || {
            env.try_status().ok().filter(|status| status.agent.ready).map(drop)
        });
        let flood = try_poll(WATCHED, || {
            assert!(!has_ours(&env, TestEnv::UPLINK, TcAttachType::Ingress), "attached to the wrong hook");
            (agent.log().lines().count() > MAX_LINES).then(|| agent.log())
        });
        assert!(flood.is_none(), "more than {MAX_LINES} lines within {WATCHED:?}: {flood:?}");

        let status = env.status();
        let code = env.imds_agent(&["status"]).output().status.code();
        if status.problems.is_empty() {
            assert_eq!(code, Some(0), "{status:#?}");
            env.assert_nothing_arrives(|| assert!(!pods.iter().any(is_open), "enforced, but open"));
        } else {
            assert_eq!(mode, AttachMode::Clsact, "TCX takes no qdisc: {:#?}", status.problems);
            assert_eq!(code, Some(NOT_ENFORCED), "{status:#?}");
            let is_named = |name: &Option<String>| name.as_deref() == Some(TestEnv::UPLINK);
            assert!(
                status.problems.iter().any(|problem| is_named(&problem.interface)),
                "{:#?}",
                status.problems
            );
        }
        assert_eq!(qdisc_kinds(&env.node, TestEnv::UPLINK), ["ingress", "noqueue"]);
        drop(agent);
        env.unload();
        assert_eq!(qdisc_kinds(&env.node, TestEnv::UPLINK), ["ingress", "noqueue"]);
        assert!(pods.iter().all(reaches_in_time));
    });
}

/// `doctor` names an `ingress` qdisc that keeps `node_egress` from the uplink, and the command that deletes the qdisc.
#[test]
fn doctor_names_the_ingress_qdisc_of_the_uplink() {
    let env = TestEnv::new();
    let (pod, uplink) = (env.add_pod(PodLink::Routed), TestEnv::UPLINK);
    // `from_pod` shares the ingress qdisc of the pod's interface.
    for interface in [uplink, &pod.host_ifname] {
        run(&env.node, &format!("tc qdisc add dev {interface} ingress"));
    }
    let check = || one(&doctor_report(&env), "tc_qdiscs").clone();
    assert_eq!(check()["state"], if hook::has_tcx() { "ok" } else { "degraded" }, "before the agent");
    let agent = env.agent().backend(AttachMode::Clsact).hooks(&["from_pod", "node_egress"]).resync(1).spawn();
    env.status_when("node_egress is not enforced", |status| {
        status.agent.ready && !status.problems.is_empty()
    });
    let named = check();
    assert_eq!(named["state"], "degraded", "{named:#}");
    for part in [uplink, "ingress qdisc", "node_egress"] {
        assert_has(&named, "observed", part);
    }
    let remedy = format!("tc qdisc delete dev {uplink} ingress");
    assert_has(&named, "remedy", &remedy);
    run(&env.node, &remedy);
    env.status_when("node_egress is enforced", |status| status.problems.is_empty());
    assert_eq!(check()["state"], "ok");
    drop(agent);
    env.unload();
}

/// A filter block that several interfaces share accepts no filter of a single interface.
#[test]
fn doctor_names_a_shared_filter_block() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    run(&env.node, &format!("tc qdisc add dev {} ingress_block 22 clsact", pod.host_ifname));
    let agent = env.agent().backend(AttachMode::Clsact).hooks(&["from_pod"]).resync(1).spawn();
    env.status_when("from_pod is not enforced", |status| status.agent.ready && !status.problems.is_empty());
    let named = one(&doctor_report(&env), "tc_qdiscs").clone();
    assert_eq!(named["state"], "degraded", "{named:#}");
    assert_has(&named, "observed", "shared filter block 22");
    let remedy = format!("tc qdisc delete dev {} clsact", pod.host_ifname);
    assert_has(&named, "remedy", &remedy);
    run(&env.node, &remedy);
    env.wait_enforced(&pod);
    env.assert_blocked(&pod);
    drop(agent);
    env.unload();
}

/// `doctor` names a `mirred` action whose target denies what passed the first interface, unless the target is excluded.
#[test]
fn doctor_names_redirects_to_another_interface() {
    const SECOND: &str = "nic1";
    let env = TestEnv::new();
    let (node, fabric, uplink) = (&env.node, &env.fabric, TestEnv::UPLINK);
    fabric
        .ip(&format!("link add node1 type veth peer name {SECOND} netns {}\nlink set node1 up", node.name()));
    node.ip(&format!("link set {SECOND} up"));
    let agent = env.agent().config("").spawn_ready();
    assert_eq!(one(&doctor_report(&env), "tc_redirects")["state"], "ok");
    // Without TCX, the agent has added the qdisc already.
    let _exists = node.command("tc").args(["qdisc", "add", "dev", uplink, "clsact"]).output();
    run(
        node,
        &format!(
            "tc filter add dev {uplink} egress protocol all prio 9 u32 match u32 0 0 action mirred egress redirect dev {SECOND}"
        ),
    );
    let named = one(&doctor_report(&env), "tc_redirects").clone();
    assert_eq!(named["state"], "degraded", "{named:#}");
    assert_has(&named, "observed", &format!("egress redirect to {SECOND}"));
    assert_has(&named, "remedy", "[interfaces] exclude");
    drop(agent);
    let excluded = format!("[interfaces]\nexclude = ['{SECOND}']");
    let agent = env.agent().config(&excluded).spawn_ready();
    assert_eq!(one(&doctor_report(&env), "tc_redirects")["state"], "ok");
    drop(agent);
    env.unload();
}

/// `from_pod` shares an `ingress` qdisc of a pod interface. The agent keeps the qdisc and foreign filters.
#[test]
fn ingress_qdisc_on_pod_link() {
    with_each_backend(|mode| {
        let env = TestEnv::new();
        let pods = [PodLink::Routed, PodLink::Bridged].map(|link| env.add_pod(link));
        for pod in &pods {
            let veth = &pod.host_ifname;
            run(&env.node, &format!("tc qdisc add dev {veth} ingress"));
            run(
                &env.node,
                &format!("tc filter add dev {veth} parent ffff: prio 7 u32 match u32 0 0 classid 1:1"),
            );
        }
        assert!(pods.iter().all(reaches_in_time));
        let agent = env.agent().backend(mode).resync(1).spawn_ready();
        for pod in &pods {
            env.assert_blocked(pod);
            env.assert_harmless(pod);
            assert_eq!(qdisc_kinds(&env.node, &pod.host_ifname), ["ingress", "noqueue"]);
        }
        assert_eq!(env.imds_agent(&["status"]).output().status.code(), Some(0));
        drop(agent);
        env.unload();
        for pod in &pods {
            let veth = &pod.host_ifname;
            assert_eq!(qdisc_kinds(&env.node, veth), ["ingress", "noqueue"]);
            assert!(!has_ours(&env, veth, TcAttachType::Ingress));
            assert!(has_u32_filter(&env, veth));
            assert!(reaches_in_time(pod));
        }
    });
}
