//! Enforcement survives the agent, and the next agent takes over without a gap.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use imds_tests::{
    AttachMode, METADATA, Pod, PodLink, TestEnv,
    flood::Flood,
    hook::{self, Attached},
    poll::poll_until,
    probe::LONG,
    scaled, skip_without_tcx, with_each_backend,
};

const LINKS: [PodLink; 2] = [PodLink::Routed, PodLink::Bridged];

fn programs_of(env: &TestEnv, pod: &Pod) -> Vec<Attached> {
    hook::programs(&env.node, &pod.host_ifname)
}

/// The record of an interface can outlive the interface while no agent runs, and a pod interface can get its index.
#[test]
fn deleted_ifb_index_is_not_exempt() {
    const INDEX: u32 = 7777;
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    env.node.ip(&format!("link add ifb-old index {INDEX} type ifb\nlink set ifb-old up"));
    let agent = env.agent().hooks(&["from_pod", "node_egress"]).spawn_ready();
    env.status_when("the ifb is recorded", |status| status.find("ifb-old").is_some());
    agent.kill9();
    let netns = pod.netns.name();
    let (node, address) = (&env.node, "10.244.77.2");
    node.ip(&format!(
        "link del ifb-old
        link add late index {INDEX} type veth peer name eth1 netns {netns}
        link set late up
        route add {address}/32 dev late"
    ));
    pod.netns.ip(&format!(
        "addr add {address}/32 dev eth1
        link set eth1 up
        route add 10.244.77.1/32 dev eth1
        route add {METADATA}/32 via 10.244.77.1 dev eth1 src {address} onlink"
    ));
    node.ip("addr add 10.244.77.1/32 dev late");
    env.assert_blocked(&pod);
    env.unload();
    env.assert_open(&pod);
}

#[test]
fn enforcement_survives_sigkill() {
    with_each_backend(|backend| {
        let env = TestEnv::new();
        let pods = LINKS.map(|link| env.add_pod(link));
        env.start_agent(backend).kill9();
        env.status().assert_lacks_only_an_agent();
        for pod in &pods {
            env.assert_blocked(pod);
            env.assert_harmless(pod);
        }
    });
}

#[test]
fn enforcement_survives_sigterm() {
    with_each_backend(|backend| {
        let env = TestEnv::new();
        let pods = LINKS.map(|link| env.add_pod(link));
        assert!(env.start_agent(backend).terminate().success());
        for pod in &pods {
            env.assert_blocked(pod);
        }
    });
}

#[test]
fn restart_keeps_counters() {
    with_each_backend(|backend| {
        let env = TestEnv::new();
        let pods = LINKS.map(|link| env.add_pod(link));
        env.start_agent(backend).kill9();
        for pod in &pods {
            env.assert_blocked(pod);
        }
        let before = env.status();
        let programs_before = pods.each_ref().map(|pod| programs_of(&env, pod));
        assert!(before.total.denied.packets > 0);

        let _agent = env.start_agent(backend);
        let after = env.status();
        assert_eq!(after.total.denied, before.total.denied);
        for (pod, programs_before) in pods.iter().zip(programs_before) {
            let name = pod.host_ifname.as_str();
            assert_eq!(after.interface(name).counts, before.interface(name).counts);
            let programs_after = programs_of(&env, pod);
            assert_eq!((programs_before.len(), programs_after.len()), (1, 1));
            assert!(programs_after[0].is_ours());
            assert_ne!(programs_after[0].id, programs_before[0].id);
            let old = programs_before[0].id;
            poll_until(LONG, "the old program to be unloaded", || (!hook::program_exists(old)).then_some(()));

            env.assert_blocked(pod);
            let denied = env.status().interface(name).counts.denied.packets;
            assert!(denied > before.interface(name).counts.denied.packets);
        }
    });
}

/// Floods the metadata service from each pod. Asserts that the packets arrive without the agent.
fn flood(pods: &[Pod; 2]) -> [Flood; 2] {
    [Flood::udp(&pods[0], METADATA), Flood::syn(&pods[1], METADATA)]
}

#[track_caller]
fn assert_flood_arrives(env: &TestEnv, pods: &[Pod; 2]) {
    let before = env.received_packets();
    let floods = flood(pods);
    poll_until(LONG, "1,000 packets to arrive from each pod", || {
        let now = env.received_packets();
        pods.iter().all(|pod| now.from(pod.address) >= before.from(pod.address) + 1000).then_some(())
    });
    drop(floods);
}

fn flood_while_agents_are_killed_and_started(backend: AttachMode, hook: &'static str) {
    let (restarts_wanted, duration) = (scaled(20), Duration::from_millis(scaled(10_000).into()));
    let env = TestEnv::new();
    let agent_of = || env.agent().backend(backend).hooks(&[hook]);
    let pods = LINKS.map(|link| env.add_pod(link));
    assert_flood_arrives(&env, &pods);

    let mut agent = agent_of().spawn_ready();
    let mut denied = env.status().total.denied.packets;
    let before = env.received_packets();
    let start = Instant::now();
    let floods = flood(&pods);
    let mut restarts = 0;
    while restarts < restarts_wanted || start.elapsed() < duration {
        agent.kill9();
        // An agent that is killed before it takes over, a little later each time.
        let stillborn = agent_of().spawn();
        sleep(Duration::from_millis(restarts.into()));
        stillborn.kill9();
        agent = agent_of().spawn_ready();
        restarts += 1;
        let now = env.status().total.denied.packets;
        assert!(now > denied, "the count went from {denied} to {now} at restart {restarts}");
        denied = now;
    }
    let sent: u64 = floods.into_iter().map(Flood::stop).sum();
    assert_eq!(env.received_packets(), before, "of {sent} packets during {restarts} restarts");
    assert!(sent > scaled(100_000).into(), "{sent} packets are no flood");
    // Each packet was counted at most once. The kernel may drop some before the hook.
    let denied = env.status().total.denied.packets;
    assert!(denied <= sent && denied > sent / 2, "{denied} of {sent} counted");

    drop(agent);
    env.unload();
    assert_flood_arrives(&env, &pods);
}

#[test]
fn restarts_deny_a_flood_tcx() {
    if skip_without_tcx() {
        return;
    }
    flood_while_agents_are_killed_and_started(AttachMode::Tcx, "from_pod");
}

#[test]
fn restarts_deny_a_flood_clsact() {
    flood_while_agents_are_killed_and_started(AttachMode::Clsact, "from_pod");
}

#[test]
fn restarts_deny_a_flood_node_egress_tcx() {
    if skip_without_tcx() {
        return;
    }
    flood_while_agents_are_killed_and_started(AttachMode::Tcx, "node_egress");
}

#[test]
fn restarts_deny_a_flood_node_egress_clsact() {
    flood_while_agents_are_killed_and_started(AttachMode::Clsact, "node_egress");
}

#[test]
fn replacement_denies_a_million_packets() {
    const PODS: usize = 100;
    const PACKETS: u64 = 1_000_000;

    let env = TestEnv::new();
    let pods: Vec<_> = (0..PODS).map(|number| env.add_pod(LINKS[number % 2])).collect();
    let all_arrive = || {
        let before = env.received_packets();
        let _flood = Flood::udp_of_all(&pods, METADATA);
        poll_until(LONG, "packets of every pod to arrive", || {
            let now = env.received_packets();
            pods.iter().all(|pod| now.from(pod.address) > before.from(pod.address)).then_some(())
        });
    };
    all_arrive();
    for hook in ["from_pod", "node_egress"] {
        let mut agent = env.agent().hooks(&[hook]).spawn_ready();
        let before = env.received_packets();
        let flood = Flood::udp_of_all(&pods, METADATA);
        let mut restarts = 0;
        while flood.sent() < PACKETS || restarts < 5 {
            agent.kill9();
            agent = env.agent().hooks(&[hook]).spawn_ready();
            restarts += 1;
        }
        let sent = flood.stop();
        assert_eq!(env.received_packets(), before, "of {sent} packets at {hook} during {restarts} restarts");
        drop(agent);
        env.unload();
        all_arrive();
    }
}

#[test]
fn attach_mode_change_denies_a_flood() {
    if skip_without_tcx() {
        return;
    }
    let env = TestEnv::new();
    let pods = LINKS.map(|link| env.add_pod(link));
    assert_flood_arrives(&env, &pods);
    let mut agent = env.start_agent(AttachMode::Tcx);
    let before = env.received_packets();
    let floods = flood(&pods);
    for backend in [AttachMode::Clsact, AttachMode::Tcx].repeat(3) {
        agent.kill9();
        agent = env.start_agent(backend);
        let status = env.status();
        for pod in &pods {
            let interface = status.interface(&pod.host_ifname);
            assert_eq!(interface.attach_mode(), Some(backend.name()));
            let (tcx, filters) =
                (hook::tcx(&env.node, &pod.host_ifname), hook::filters(&env.node, &pod.host_ifname));
            let expected = if backend == AttachMode::Tcx { (1, 0) } else { (0, 1) };
            assert_eq!((tcx.len(), filters.len()), expected, "with {}", backend.name());
            assert_eq!(hook::has_clsact(&env.node, &pod.host_ifname), backend == AttachMode::Clsact);
        }
    }
    let sent: u64 = floods.into_iter().map(Flood::stop).sum();
    assert_eq!(env.received_packets(), before, "of {sent} packets");
    drop(agent);
    env.unload();
    assert_flood_arrives(&env, &pods);
}
