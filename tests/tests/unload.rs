//! `unload` removes everything of the agent, and nothing of other software.

use std::{fs, process::Stdio};

use aya::programs::tc::TcAttachType;
use imds_tests::{
    AttachMode, Pod, PodLink, TestEnv,
    foreign_bpf::{ForeignProgram, TC_ACT_OK},
    hook::{self, run_tc},
    poll::poll_until,
    probe::LONG,
    skip_without_tcx, with_each_backend,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

const LINKS: [PodLink; 2] = [PodLink::Routed, PodLink::Bridged];
const MAPS: [&str; 4] = ["maps/imds_policy", "maps/imds_counters", "maps/imds_interfaces", "maps/AYA_LOGS"];

fn our_programs(env: &TestEnv, pods: &[Pod]) -> Vec<u32> {
    let attached = pods.iter().flat_map(|pod| hook::programs(&env.node, &pod.host_ifname));
    let mut ids: Vec<_> = attached.filter(hook::Attached::is_ours).map(|program| program.id).collect();
    for program in fs::read_dir(env.pin_dir().join("progs")).unwrap() {
        ids.push(hook::pinned_program(&program.unwrap().path()));
    }
    ids
}

#[test]
fn unload_leaves_nothing() {
    with_each_backend(|backend| {
        let env = TestEnv::new();
        let pods = LINKS.map(|link| env.add_pod(link));
        env.start_agent(backend).kill9();
        let programs = our_programs(&env, &pods);
        assert!(programs.len() >= 4, "one per pod and two pins: {programs:?}");
        let maps = MAPS.map(|map| hook::pinned_map(&env.pin_dir().join(map)));

        env.unload();

        assert!(!env.pin_dir().exists());
        for pod in &pods {
            assert_eq!(hook::programs(&env.node, &pod.host_ifname), []);
            assert!(!hook::has_clsact(&env.node, &pod.host_ifname));
            env.assert_open(pod);
        }
        // The kernel frees objects after a grace period.
        poll_until(LONG, "programs and maps to be freed", || {
            let programs_left = programs.iter().any(|id| hook::program_exists(*id));
            let maps_left = maps.iter().any(|id| hook::map_exists(*id));
            (!programs_left && !maps_left).then_some(())
        });
        assert_eq!(env.status().state, "unloaded");
    });
}

#[test]
fn unload_without_programs_succeeds() {
    let env = TestEnv::new();
    env.unload();
    env.agent().once();
    env.unload();
    env.unload();
    assert!(!env.pin_dir().exists());
}

#[test]
fn earlier_clsact_qdisc_stays() {
    with_each_backend(|backend| {
        let env = TestEnv::new();
        let pods = LINKS.map(|link| env.add_pod(link));
        for pod in &pods {
            run_tc(&env.node, &["qdisc", "add", "dev", &pod.host_ifname, "clsact"]);
        }
        let with_filter = &pods[0].host_ifname;
        ForeignProgram::returning(TC_ACT_OK).attach_filter(&env.node, with_filter, TcAttachType::Ingress, 7);
        let theirs = hook::filters(&env.node, with_filter);
        env.start_agent(backend).kill9();
        env.assert_blocked(&pods[0]);

        env.unload();
        assert!(pods.iter().all(|pod| hook::has_clsact(&env.node, &pod.host_ifname)));
        assert_eq!(hook::programs(&env.node, with_filter), theirs);
        assert_eq!(hook::programs(&env.node, &pods[1].host_ifname), []);
    });
}

#[test]
fn foreign_filter_on_own_qdisc_stays() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    env.start_agent(AttachMode::Clsact).kill9();
    ForeignProgram::returning(TC_ACT_OK).attach_filter(&env.node, &pod.host_ifname, TcAttachType::Ingress, 7);
    env.unload();
    let left = hook::filters(&env.node, &pod.host_ifname);
    assert_eq!(left.iter().map(hook::Attached::is_ours).collect::<Vec<_>>(), [false]);
}

#[test]
fn foreign_tcx_program_stays() {
    if skip_without_tcx() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Bridged);
    let _link = ForeignProgram::returning(TC_ACT_OK).attach_tcx_first(
        &env.node,
        pod.host_ifindex,
        TcAttachType::Ingress,
    );
    let theirs = hook::tcx(&env.node, &pod.host_ifname);
    env.start_agent(AttachMode::Tcx).kill9();
    env.unload();
    assert_eq!(hook::tcx(&env.node, &pod.host_ifname), theirs);
}

#[test]
fn running_agent_stays_unloaded() {
    with_each_backend(|backend| {
        let env = TestEnv::new();
        let pod = env.add_pod(PodLink::Routed);
        let agent = env.agent().backend(backend).hooks(&["from_pod", "node_egress"]).resync(1).spawn_ready();
        env.assert_blocked(&pod);
        let programs = our_programs(&env, std::slice::from_ref(&pod));
        let maps = MAPS.map(|map| hook::pinned_map(&env.pin_dir().join(map)));

        let output = env.imds_agent(&["unload"]).output();
        let stdout = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{output:?}\n{}", agent.log());
        assert!(stdout.contains(&format!("pid {}", agent.pid())) && stdout.contains("restart"), "{stdout}");
        assert!(!env.pin_dir().exists());
        assert_eq!(hook::programs(&env.node, &pod.host_ifname), []);
        env.assert_open(&pod);

        poll_until(LONG, "programs and maps to be freed", || {
            let programs_left = programs.iter().any(|id| hook::program_exists(*id));
            let maps_left = maps.iter().any(|id| hook::map_exists(*id));
            (!programs_left && !maps_left).then_some(())
        });

        // The process keeps running, so that no service manager restarts it, and ignores new pods.
        agent.wait_for_log("nothing is enforced until the agent is restarted", LONG);
        let late = env.add_pod(PodLink::Routed);
        env.assert_open(&late);
        assert_eq!(env.status().state, "unloaded");
        assert!(!env.pin_dir().exists());
        assert!(agent.terminate().success());

        // The next agent enforces.
        let _agent = env.start_agent(backend);
        env.assert_blocked(&late);
    });
}

#[test]
fn hanging_agent_is_reported() {
    with_each_backend(|backend| {
        let env = TestEnv::new();
        let pod = env.add_pod(PodLink::Routed);
        let agent = env.start_agent(backend);
        let pid = Pid::from_raw(agent.pid().try_into().unwrap());
        kill(pid, Signal::SIGSTOP).unwrap();
        env.assert_blocked(&pod);

        let output = env.imds_agent(&["unload", "--timeout", "1"]).output();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        let unload = format!("imds-agent unload --pin-dir {}", env.pin_dir().display());
        for part in [&*pid.to_string(), "Stop the agent first", &unload] {
            assert!(stderr.contains(part), "{part}: {stderr}");
        }
        // Disabling the policy is the first step of the unload.
        env.assert_open(&pod);

        // The unload request waits until the agent continues.
        kill(pid, Signal::SIGCONT).unwrap();
        agent.wait_for_log("nothing is enforced until the agent is restarted", LONG);
        env.unload();
        assert!(!env.pin_dir().exists());
    });
}

#[test]
fn unload_after_pods_are_deleted() {
    with_each_backend(|backend| {
        let env = TestEnv::new();
        let pod = env.add_pod(PodLink::Routed);
        env.start_agent(backend).kill9();
        pod.delete();
        env.unload();
        assert!(!env.pin_dir().exists());
    });
}

/// Prevents an immediate restart by a supervisor.
#[test]
fn unload_waits_if_requested() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    env.assert_open(&pod);
    assert!(env.agent().once().status.success());
    env.assert_blocked(&pod);
    let mut unload = env.imds_agent(&["unload", "--wait"]).command().spawn().unwrap();
    poll_until(LONG, "the pin directory to be removed", || (!env.pin_dir().exists()).then_some(()));
    env.assert_open(&pod);
    assert!(unload.try_wait().unwrap().is_none());
    kill(Pid::from_raw(unload.id().try_into().unwrap()), Signal::SIGTERM).unwrap();
    let ended = poll_until(LONG, "the command to end", || unload.try_wait().unwrap());
    assert!(ended.success(), "{ended}");
}

/// The agent does not watch for requests during its initial resync.
#[test]
fn unload_during_the_start() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    // A resync would find the request.
    let agent = env.agent().resync(3600).spawn();
    let policy = env.pin_dir().join(MAPS[0]);
    poll_until(LONG, "the agent to pin its maps", || policy.exists().then_some(()));
    env.unload();
    env.assert_open(&pod);
    drop(agent);
}

/// `unload` removes the directories of an agent that starts at the same time, and waits for the lock.
#[test]
fn agent_that_starts_during_an_unload() {
    let env = TestEnv::new();
    for _ in 0..20 {
        let once = || {
            let output = env.agent().once();
            assert!(output.status.success(), "{output:?}");
        };
        once();
        let mut unload = env.imds_agent(&["unload", "--stopped"]).command();
        let mut unload = unload.stdout(Stdio::null()).spawn().unwrap();
        once();
        assert!(unload.wait().unwrap().success());
    }
}
