//! Programs, qdiscs and pins that other software removes are restored, and the log reports it.

use std::{fs, path::PathBuf};

use aya::programs::tc::TcAttachType;
use imds_tests::{
    Agent, AttachMode, METADATA, Pod, PodLink, TestEnv,
    foreign_bpf::detach_link,
    hook::{self, run_tc},
    output,
    poll::poll_until,
    probe::{LONG, SHORT, http_get},
    skip_without_netns_cookie, skip_without_tcx, with_each_backend,
};

const LINKS: [PodLink; 2] = [PodLink::Routed, PodLink::Bridged];

fn start(env: &TestEnv, backend: AttachMode) -> Agent<'_> {
    env.agent().backend(backend).resync(1).spawn_ready()
}

fn link_pin(env: &TestEnv, pod: &Pod) -> PathBuf {
    env.pin_dir().join(format!("links/from_pod_{}", pod.host_ifindex))
}

/// Removes the pin directory. The agent may restore pins in the meantime, so that the directory is not empty.
fn remove_pins(env: &TestEnv) {
    poll_until(LONG, "the pin directory to be removed", || fs::remove_dir_all(env.pin_dir()).ok());
}

/// Detaches the agent's program without a trace in the pin directory.
fn detach(env: &TestEnv, backend: AttachMode, pod: &Pod) {
    match backend {
        AttachMode::Tcx => detach_link(&link_pin(env, pod)),
        AttachMode::Clsact => run_tc(&env.node, &["qdisc", "delete", "dev", &pod.host_ifname, "clsact"]),
    }
}

/// Waits until the agent's program is first at the hook again, and until the log reports it.
fn assert_restored(env: &TestEnv, agent: &Agent<'_>, pod: &Pod, lines_before: usize) {
    poll_until(LONG, "the program to be attached again", || {
        hook::programs(&env.node, &pod.host_ifname).first().is_some_and(hook::Attached::is_ours).then_some(())
    });
    env.assert_blocked(pod);
    poll_until(LONG, "a line in the log that names the interface", || {
        agent.log().lines().skip(lines_before).any(|line| line.contains(&pod.host_ifname)).then_some(())
    });
    env.status_when("the agent is ready", |status| status.is_ready() && status.state == "enforcing");
}

#[test]
fn detached_tcx_link_is_restored() {
    if skip_without_tcx() {
        return;
    }
    let env = TestEnv::new();
    let pods = LINKS.map(|link| env.add_pod(link));
    let agent = start(&env, AttachMode::Tcx);
    for pod in &pods {
        let lines = agent.log().lines().count();
        detach(&env, AttachMode::Tcx, pod);
        assert_restored(&env, &agent, pod, lines);
        assert_eq!(hook::tcx(&env.node, &pod.host_ifname).len(), 1);
    }
}

#[test]
fn removed_clsact_qdisc_is_restored() {
    let env = TestEnv::new();
    let pods = LINKS.map(|link| env.add_pod(link));
    let agent = start(&env, AttachMode::Clsact);
    for pod in &pods {
        let lines = agent.log().lines().count();
        detach(&env, AttachMode::Clsact, pod);
        assert_restored(&env, &agent, pod, lines);
        assert_eq!(hook::filters(&env.node, &pod.host_ifname).len(), 1);
    }
    // A recreated qdisc still belongs to the agent.
    drop(agent);
    env.unload();
    assert!(pods.iter().all(|pod| !hook::has_clsact(&env.node, &pod.host_ifname)));
}

#[test]
fn removed_filter_is_restored() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let agent = start(&env, AttachMode::Clsact);
    let lines = agent.log().lines().count();
    run_tc(&env.node, &["filter", "delete", "dev", &pod.host_ifname, "ingress"]);
    assert_restored(&env, &agent, &pod, lines);
}

#[test]
fn removed_link_pin_is_restored() {
    if skip_without_tcx() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Bridged);
    let _agent = start(&env, AttachMode::Tcx);
    let pin = link_pin(&env, &pod);
    let before = hook::tcx(&env.node, &pod.host_ifname);

    fs::remove_file(&pin).unwrap();
    env.assert_blocked(&pod);
    poll_until(LONG, "the link to be pinned again", || pin.exists().then_some(()));
    assert_eq!(hook::tcx(&env.node, &pod.host_ifname), before);
    env.status_when("the agent is ready", |status| status.is_ready() && status.state == "enforcing");
}

#[test]
fn removed_pin_directory_is_restored() {
    with_each_backend(|backend| {
        let env = TestEnv::new();
        let pod = env.add_pod(PodLink::Routed);
        let _agent = start(&env, backend);
        env.assert_blocked(&pod);
        let denied = env.status().total.denied.packets;

        remove_pins(&env);
        env.assert_blocked(&pod);
        let status =
            env.status_when("the agent is ready", |status| status.is_ready() && status.state == "enforcing");
        assert!(status.total.denied.packets > denied);
        for pin in ["maps/imds_policy", "maps/imds_counters", "maps/imds_interfaces", "progs/imds_from_pod"] {
            assert!(env.pin_dir().join(pin).exists(), "{pin}");
        }
    });
}

#[test]
fn detached_without_agent_is_restored() {
    with_each_backend(|backend| {
        let env = TestEnv::new();
        let pod = env.add_pod(PodLink::Routed);
        start(&env, backend).kill9();
        detach(&env, backend, &pod);
        env.assert_open(&pod);

        let status = env.status();
        assert_eq!(
            (status.state.as_str(), status.interface(&pod.host_ifname).attach_mode()),
            ("degraded", None)
        );
        assert!(status.problems.iter().any(|problem| problem.interface.as_ref() == Some(&pod.host_ifname)));
        assert_eq!(env.imds_agent(&["status"]).output().status.code(), Some(3));

        // The initial sync is one line at level info.
        let args = ["--log-level", "debug"];
        let agent = env.agent().backend(backend).resync(1).args(&args).spawn_ready();
        assert_restored(&env, &agent, &pod, 0);
    });
}

/// Reports whether the agent's program is the first one at egress of the uplink.
fn is_uplink_enforced(env: &TestEnv) -> bool {
    hook::programs_at(&env.node, TestEnv::UPLINK, TcAttachType::Egress)
        .first()
        .is_some_and(hook::Attached::is_ours)
}

#[test]
fn node_egress_is_restored() {
    with_each_backend(|backend| {
        let env = TestEnv::new();
        let pod = env.add_pod(PodLink::Routed);
        env.assert_open(&pod);
        let agent = env.agent().backend(backend).hooks(&["node_egress"]).resync(1).spawn_ready();
        env.assert_blocked(&pod);
        let index = env.status().interface(TestEnv::UPLINK).ifindex;
        let lines = agent.log().lines().count();
        match backend {
            AttachMode::Tcx => detach_link(&env.pin_dir().join(format!("links/node_egress_{index}"))),
            AttachMode::Clsact => run_tc(&env.node, &["qdisc", "delete", "dev", TestEnv::UPLINK, "clsact"]),
        }
        poll_until(LONG, "the program to be attached again", || is_uplink_enforced(&env).then_some(()));
        env.assert_blocked(&pod);
        poll_until(LONG, "a line in the log that names the interface", || {
            agent.log().lines().skip(lines).any(|line| line.contains(TestEnv::UPLINK)).then_some(())
        });
        env.status_when("the agent is ready", |status| status.is_ready() && status.state == "enforcing");
        drop(agent);
        env.unload();
        env.assert_open(&pod);
    });
}

#[test]
fn nft_flush_keeps_enforcement() {
    let hooks: [&[&str]; 3] = [&["from_pod"], &["node_egress"], &["socket"]];
    if skip_without_netns_cookie() {
        return;
    }
    for on in hooks {
        let env = TestEnv::new();
        let pod = env.add_pod(PodLink::Routed);
        let is_open = || env.in_cgroup(|| http_get(&pod.netns, METADATA, SHORT).is_answer());
        poll_until(LONG, "the service to be reachable", || is_open().then_some(()));
        let agent = env.agent().hooks(on).spawn_ready();
        let before = env.status();
        let mut flush = env.node.command("nft");
        flush.args(["flush", "ruleset"]);
        assert!(output(flush).status.success());
        assert!(!is_open(), "{on:?}");
        let after = env.status();
        assert_eq!((&*before.state, before.problems.len()), (&*after.state, after.problems.len()));
        drop(agent);
        env.unload();
        poll_until(LONG, "the service to be reachable again", || is_open().then_some(()));
    }
}

#[test]
fn pins_of_every_hook_are_restored() {
    if skip_without_netns_cookie() {
        return;
    }
    for on in ["from_pod", "node_egress", "socket"] {
        let env = TestEnv::new();
        let pod = env.add_pod(PodLink::Bridged);
        let is_open = || env.in_cgroup(|| http_get(&pod.netns, METADATA, SHORT).is_answer());
        poll_until(LONG, "the service to be reachable", || is_open().then_some(()));
        let agent = env.agent().hooks(&[on]).resync(1).spawn_ready();
        let links = || {
            let entries = fs::read_dir(env.pin_dir().join("links")).into_iter().flatten().flatten();
            let mut names: Vec<_> = entries.map(|entry| entry.file_name()).collect();
            names.sort();
            names
        };
        let before = links();
        remove_pins(&env);
        assert!(!is_open(), "{on}");
        poll_until(LONG, "the links to be pinned again", || (links() == before).then_some(()));
        assert!(!is_open(), "{on}");
        env.status_when("the agent is ready", |status| status.is_ready() && status.state == "enforcing");
        drop(agent);
        env.unload();
        poll_until(LONG, "the service to be reachable again", || is_open().then_some(()));
    }
}
