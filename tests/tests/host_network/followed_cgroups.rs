//! Cgroups and links that appear and disappear while the agent runs, and restarts of the agent.

use std::{
    fs,
    sync::atomic::{AtomicU64, Ordering},
    thread,
};

use imds_tests::{
    Cgroup, METADATA, StopFlag, TestEnv, foreign_bpf,
    poll::poll_until,
    probe::{LONG, SHORT, connect, reachable},
    skip_without_netns_cookie,
};

use crate::{ALL, CONTAINER, ECHO_PORT, HOST_NETWORK, IN_KIND, host_links, is_denied, send_raw, udp_socket};

#[test]
fn added_and_removed_cgroups_are_followed() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    // No resync runs during the test, so that only events can report the cgroups.
    let agent = env.agent().hooks(&[HOST_NETWORK]).resync(3600).spawn();
    agent.wait_for_log("hostNetwork pods are not restricted", LONG);
    let status = env.status_when("the problem is reported", |status| status.agent.ready);
    assert_eq!(status.state, "degraded");
    let [problem] = &status.problems[..] else { panic!("{:#?}", status.problems) };
    assert!(problem.problem.contains("hostNetwork") && problem.remedy.contains("cgroup"), "{problem:?}");

    let mut cgroups = Vec::new();
    for (count, path) in (1..).zip(["kubepods", CONTAINER, IN_KIND]) {
        let cgroup = env.add_cgroup(path);
        assert_ne!(env.status().state, "unloaded");
        env.status_when("the programs are attached", |status| {
            let host = status.host_network.as_ref().expect("host_network is on");
            host.attached && host.cgroups.len() == count && status.state == "enforcing"
        });
        assert!(cgroup.run(|| is_denied(env.node.run(|| connect(METADATA, SHORT)))), "{path}");
        cgroups.push(cgroup);
    }
    assert!(reachable(&env.node, METADATA));
    assert_eq!(host_links(&env).len(), 15);
    drop(cgroups);
    poll_until(LONG, "the pins to be removed", || host_links(&env).is_empty().then_some(()));
    drop(agent);
    env.unload();
    let cgroup = env.add_cgroup(CONTAINER);
    assert!(cgroup.run(|| reachable(&env.node, METADATA)));
}

#[test]
fn once_without_kubepods_cgroup_fails() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let output = env.agent().hooks(&ALL).once();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(
        stderr.contains("hostNetwork pods") && stderr.contains(env.cgroup().to_str().unwrap()),
        "{stderr}"
    );
    let _container = env.add_cgroup(CONTAINER);
    let output = env.agent().hooks(&ALL).once();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn detached_host_network_is_restored() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let container = env.add_cgroup(CONTAINER);
    let agent = env.agent().hooks(&[HOST_NETWORK]).resync(1).spawn_ready();
    let kubepods = env.status().host_network.expect("host_network is on").cgroups[0];
    let is_blocked = || is_denied(container.run(|| send_raw(&env.node, METADATA, 132)));
    assert!(is_blocked());
    foreign_bpf::detach_link(&env.pin_dir().join(format!("links/host_egress_{kubepods}")));
    agent.wait_for_log("attached imds_host_out", LONG);
    poll_until(LONG, "packets to be denied again", || is_blocked().then_some(()));
    fs::remove_file(env.pin_dir().join(format!("links/host_connect4_{kubepods}"))).unwrap();
    agent.wait_for_log("pinned the link of imds_host_conn4", LONG);
    env.status_when("the agent is ready", |status| status.is_ready() && status.state == "enforcing");
}

/// Sends to the metadata service with a sendto call, with a connect call and from a raw socket, until `stop` is set.
fn send_until(env: &TestEnv, container: &Cgroup, stop: &StopFlag, tried: &AtomicU64) {
    container.run(|| {
        let (named, connected) = (udp_socket(&env.node, "0.0.0.0:0"), udp_socket(&env.node, "0.0.0.0:0"));
        while !stop.is_set() {
            // The call is denied, or its packet is counted on arrival.
            let _ = named.send_to(b"echo", (METADATA, ECHO_PORT));
            let _ = connected.connect((METADATA, ECHO_PORT)).and_then(|()| connected.send(b"echo"));
            let _ = send_raw(&env.node, METADATA, 132);
            tried.fetch_add(3, Ordering::Relaxed);
        }
    });
}

#[test]
fn host_network_survives_restart() {
    const RESTARTS: usize = 10;
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let container = env.add_cgroup(CONTAINER);
    let (stop, tried) = (StopFlag::default(), AtomicU64::new(0));
    assert!(env.arrives(|| {
        for protocol in [17, 132] {
            container.run(|| send_raw(&env.node, METADATA, protocol)).unwrap();
        }
    }));
    let agent = env.agent().hooks(&[HOST_NETWORK]).spawn_ready();
    let before = env.received_packets();
    let agent = thread::scope(|scope| {
        let mut agent = agent;
        let _stop_on_drop = stop.set_on_drop();
        scope.spawn(|| send_until(&env, &container, &stop, &tried));
        for _ in 0..RESTARTS {
            agent.kill9();
            let before = tried.load(Ordering::Relaxed);
            poll_until(LONG, "attempts without an agent", || {
                (tried.load(Ordering::Relaxed) > before + 30).then_some(())
            });
            agent = env.agent().hooks(&[HOST_NETWORK]).spawn_ready();
        }
        agent
    });
    let tried = tried.into_inner();
    assert_eq!(env.received_packets(), before, "of {tried} attempts during {RESTARTS} restarts");
    let denied = env.status().host_network.expect("host_network is on").counts.denied.packets;
    assert!(denied >= tried, "{denied} of {tried} counted");
    drop(agent);
    env.status().assert_lacks_only_an_agent();
    env.unload();
    assert!(container.run(|| reachable(&env.node, METADATA)));
}
