//! Qdiscs and program lists of other software that exist before the agent starts: shared if possible, otherwise
//! reported.

use aya::programs::tc::TcAttachType;
use imds_tests::{
    Agent, AttachMode, METADATA, Pod, PodLink, Status, TestEnv,
    foreign_bpf::ForeignProgram,
    hook::{self, Attached, run_tc},
    probe::{LONG, reachable},
    skip_without_tcx,
};

/// TC action that leaves the packet to the next program.
const TC_ACT_UNSPEC: i32 = -1;
/// Maximum number of programs that the kernel supports at one hook (`bpf_mprog_max`).
const MAX_PROGRAMS: usize = 63;

/// Returns the attach mode of the interface's hook from the status.
fn attach_mode(status: &Status, interface: &str) -> Option<String> {
    status.find(interface)?.attach_mode().map(str::to_owned)
}

fn is_first(status: &Status, interface: &str) -> bool {
    status.find(interface).is_some_and(|interface| interface.is_first() == Some(true))
}

fn has_problem(status: &Status, interface: &str) -> bool {
    status.problems.iter().any(|problem| problem.interface.as_deref() == Some(interface))
}

/// Waits until the status reports that the interface is not enforced, and checks the exit code.
#[track_caller]
fn assert_not_enforced(env: &TestEnv, interface: &str) {
    let status = env.status_when("the interface is not enforced", |status| {
        status.agent.ready && has_problem(status, interface)
    });
    assert!(!status.interface(interface).is_attached());
    assert_eq!(status.state, "degraded");
    assert_eq!(env.imds_agent(&["status"]).output().status.code(), Some(3));
}

/// Asserts that repeated events of the interface, each of which causes a reconcile, add no lines to the log.
#[track_caller]
fn assert_log_is_bounded(env: &TestEnv, agent: &Agent<'_>, interface: &str) {
    let lines = || agent.log().lines().filter(|line| line.contains(interface)).count();
    for length in 500..520 {
        env.node.ip(&format!("link set {interface} txqueuelen {length}"));
    }
    // The agent reconciles this pod after the earlier events.
    let pod = env.add_pod(PodLink::Routed);
    env.wait_enforced(&pod);
    assert!(lines() <= 3, "{}", agent.log());
}

fn qdisc(env: &TestEnv, interface: &str, args: &str) {
    let args: Vec<_> = args.split_whitespace().collect();
    run_tc(&env.node, &[&["qdisc", args[0], "dev", interface], &args[1..]].concat());
}

fn ours(programs: &[Attached]) -> usize {
    programs.iter().filter(|program| program.is_ours()).count()
}

#[track_caller]
fn assert_pod_enforced(env: &TestEnv, pod: &Pod) {
    let status = env.status_when("the pod is enforced", |status| {
        is_first(status, &pod.host_ifname) && !has_problem(status, &pod.host_ifname)
    });
    assert!(attach_mode(&status, &pod.host_ifname).is_some());
    env.assert_blocked(pod);
    env.assert_harmless(pod);
}

#[test]
fn from_pod_shares_an_ingress_qdisc() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let veth = &*pod.host_ifname;
    qdisc(&env, veth, "add ingress");
    ForeignProgram::returning(TC_ACT_UNSPEC).attach_filter(&env.node, veth, TcAttachType::Ingress, 1);
    env.assert_open(&pod);

    let agent = env.start_agent(AttachMode::Clsact);
    assert_pod_enforced(&env, &pod);
    let is_ours: Vec<_> = hook::filters(&env.node, veth).iter().map(Attached::is_ours).collect();
    assert_eq!(is_ours, [true, false]);
    assert!(!hook::has_clsact(&env.node, veth));

    // The next agent replaces the filter in its position.
    agent.kill9();
    let agent = env.start_agent(AttachMode::Clsact);
    assert_pod_enforced(&env, &pod);
    drop(agent);
    env.unload();
    // Foreign filters and qdiscs stay: adding the filter again fails.
    let is_ours: Vec<_> = hook::filters(&env.node, veth).iter().map(Attached::is_ours).collect();
    assert_eq!(is_ours, [false]);
    qdisc(&env, veth, "del ingress");
    env.assert_open(&pod);
}

#[test]
fn ingress_qdisc_prevents_node_egress() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    qdisc(&env, TestEnv::UPLINK, "add ingress");
    env.assert_open(&pod);
    let agent = env.agent().backend(AttachMode::Clsact).hooks(&["from_pod", "node_egress"]).resync(1).spawn();
    assert_not_enforced(&env, TestEnv::UPLINK);
    agent.wait_for_log("its ingress qdisc occupies the clsact slot; delete the qdisc", LONG);
    assert_log_is_bounded(&env, &agent, TestEnv::UPLINK);
    // A filter for egress would run at ingress.
    for direction in [TcAttachType::Ingress, TcAttachType::Egress] {
        let programs = hook::programs_at(&env.node, TestEnv::UPLINK, direction);
        assert!(!programs.iter().any(|program| program.name.starts_with("imds_egress")), "{programs:?}");
    }
    assert!(reachable(&env.node, METADATA));

    qdisc(&env, TestEnv::UPLINK, "del ingress");
    env.status_when("node_egress is enforced", |status| {
        is_first(status, TestEnv::UPLINK) && !has_problem(status, TestEnv::UPLINK)
    });
    assert_eq!(ours(&hook::programs_at(&env.node, TestEnv::UPLINK, TcAttachType::Egress)), 1);
    assert!(reachable(&env.node, METADATA));
    drop(agent);
    env.unload();
    env.assert_open(&pod);
}

/// `tc` lists the filter of `from_pod` on an `ingress` qdisc at egress too.
#[test]
fn ingress_qdisc_keeps_from_pod_only() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Bridged);
    qdisc(&env, &pod.host_ifname, "add ingress");
    env.assert_open(&pod);
    let agent =
        env.agent().backend(AttachMode::Clsact).hooks(&["from_pod", "node_egress"]).resync(1).spawn_ready();
    assert_pod_enforced(&env, &pod);
    assert_log_is_bounded(&env, &agent, &pod.host_ifname);
    assert_eq!(ours(&hook::filters(&env.node, &pod.host_ifname)), 1);
    drop(agent);
    env.unload();
    env.assert_open(&pod);
}

#[test]
fn shared_block_is_not_enforced() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    qdisc(&env, &pod.host_ifname, "add ingress_block 22 clsact");
    env.assert_open(&pod);
    let agent = env.agent().backend(AttachMode::Clsact).resync(1).spawn();
    assert_not_enforced(&env, &pod.host_ifname);
    agent.wait_for_log("its clsact qdisc uses the shared filter block 22", LONG);
    assert_log_is_bounded(&env, &agent, &pod.host_ifname);

    qdisc(&env, &pod.host_ifname, "del clsact");
    assert_pod_enforced(&env, &pod);
    drop(agent);
    env.unload();
    env.assert_open(&pod);
}

#[test]
fn full_list_of_programs_is_not_enforced() {
    if skip_without_tcx() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let attach = || {
        ForeignProgram::returning(TC_ACT_UNSPEC).attach_tcx_first(
            &env.node,
            pod.host_ifindex,
            TcAttachType::Ingress,
        )
    };
    let mut links: Vec<_> = (0..MAX_PROGRAMS).map(|_| attach()).collect();
    env.assert_open(&pod);
    let agent = env.agent().backend(AttachMode::Tcx).resync(1).spawn();
    assert_not_enforced(&env, &pod.host_ifname);
    agent.wait_for_log("at most 63 programs at a hook", LONG);
    assert_log_is_bounded(&env, &agent, &pod.host_ifname);

    links.pop();
    assert_pod_enforced(&env, &pod);
    drop(agent);
    env.unload();
    env.assert_open(&pod);
}
