//! A broker that ends, hangs or is missing: pods with a scoped exemption are refused, and served again after a restart.

use std::{fs, time::Instant};

use imds_tests::{
    PodLink, TestEnv,
    executable::{agent_executable, broker_of, find_program, write_executable},
    http::{DEFAULT, try_get},
    poll::poll_until,
    probe::LONG,
    skip_without_netns_cookie,
};
use nix::sys::signal::Signal;

use crate::{
    ALLOWED, HOOKS, IMDS, assert_denied, assert_scoped, get, redirected, scoped_netns, stand_in, start,
    wait_allowed,
};

#[test]
fn killed_broker_is_replaced() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let agent = start(&env, &pod);
    for restarts in 1..=2 {
        let broker = broker_of(agent.pid()).expect("a broker");
        stand_in::signal(broker, Signal::SIGKILL);
        let killed = Instant::now();
        poll_until(LONG, "another broker", || broker_of(agent.pid()).filter(|&pid| pid != broker));
        wait_allowed(&env, &pod.netns, IMDS);
        println!("served again after {:?}", killed.elapsed());
        assert_scoped(&env, &pod.netns, IMDS);
        let series = format!("imds_agent_broker_restarts_total {restarts}\n");
        poll_until(LONG, "the restart to be counted", || {
            let (_, metrics) = try_get(&env, DEFAULT, "/metrics").ok()?;
            metrics.contains(&series).then_some(())
        });
    }
}

/// A broker that stops answering does not close its socket.
#[test]
fn hanging_broker_is_replaced() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let agent = start(&env, &pod);
    let broker = broker_of(agent.pid()).expect("a broker");
    stand_in::signal(broker, Signal::SIGSTOP);
    poll_until(4 * LONG, "another broker", || broker_of(agent.pid()).filter(|&pid| pid != broker));
    wait_allowed(&env, &pod.netns, IMDS);
    assert_scoped(&env, &pod.netns, IMDS);
}

/// The packaged service has no `CAP_KILL`, and the broker has another user than the agent.
#[test]
fn agent_without_cap_kill_ends_the_broker() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let wrapper = env.scratch_dir().join("agent");
    let program = agent_executable();
    // The wrapper names the path, because busybox's shell prefers its own setpriv.
    let setpriv = find_program("setpriv").expect("setpriv of util-linux");
    let drop_kill = format!("exec {} --bounding-set -kill --inh-caps -kill", setpriv.display());
    write_executable(&wrapper, &format!("#!/bin/sh\n{drop_kill} {} \"$@\"\n", program.display()));
    let agent = env.agent().config(&scoped_netns(&pod.netns)).hooks(HOOKS).binary(&wrapper).spawn_ready();
    wait_allowed(&env, &pod.netns, IMDS);
    let broker = broker_of(agent.pid()).expect("a broker");
    assert!(agent.terminate().success());
    poll_until(LONG, "the broker to end", || (!stand_in::exists(broker)).then_some(()));
    assert_denied(&env, &pod.netns);
}

#[test]
fn broken_brokers_are_reported() {
    if skip_without_netns_cookie() {
        return;
    }
    for (name, text, problem) in [
        ("ends", "exit 3", "the broker ended: exit status: 3"),
        ("hangs", "exec sleep 1000", "the broker does not answer"),
        ("talks", "echo nonsense >&0; exec sleep 1000", "the broker sent an invalid message"),
    ] {
        let env = TestEnv::new();
        let pod = env.add_pod(PodLink::Routed);
        let broker = stand_in::script(&env, name, text);
        let command = env.agent().config(&scoped_netns(&pod.netns)).hooks(HOOKS);
        let agent = command.args(&["--broker", broker.to_str().unwrap()]).spawn_degraded(problem);
        assert_denied(&env, &pod.netns);
        assert!(redirected(&env.status()).is_empty());
        // Once it works, the pod is served.
        fs::copy(stand_in::broker(&env), &broker).unwrap();
        wait_allowed_late(&env, &pod.netns);
        drop(agent);
        env.unload();
    }
}

#[track_caller]
fn wait_allowed_late(env: &TestEnv, netns: &imds_tests::Netns) {
    poll_until(4 * LONG, "the repaired broker to serve", || {
        (get(env, netns, IMDS, ALLOWED).ok() == Some(200)).then_some(())
    });
}

#[test]
fn missing_broker_is_reported() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let command = env.agent().config(&scoped_netns(&pod.netns)).hooks(HOOKS);
    let _agent = command.args(&["--broker", "/nonexistent"]).spawn_degraded("failed to start /nonexistent");
    assert_denied(&env, &pod.netns);
    let once = env.agent().config(&scoped_netns(&pod.netns)).hooks(HOOKS).args(&["--broker", "/x"]).once();
    assert_eq!(once.status.code(), Some(2), "{once:?}");
}
