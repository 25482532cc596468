//! `verify` leaves nothing behind, even if it is killed, and passes on a busy machine.

use std::{
    hint::spin_loop,
    process::Stdio,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use aya::programs::tc::TcAttachType;
use imds_tests::{
    TestEnv, hook::programs_at, poll::poll_until, probe::LONG, scaled, skip_without_netns_cookie,
    with_each_backend,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{ALL, add_pods, assert_all_passed, assert_nothing_left, exempt, interfaces, verify};

/// Returns the routes of the node and the number of programs at its uplink. Link-local IPv6 routes appear some time
/// after their links.
fn state_of(env: &TestEnv) -> (String, usize) {
    let routes =
        env.node.command("ip").args(["-4", "route", "show", "table", "all"]).output().unwrap().stdout;
    let programs = programs_at(&env.node, TestEnv::UPLINK, TcAttachType::Egress).len();
    // The kernel sets and clears this flag with the carrier of a bridge.
    (String::from_utf8(routes).unwrap().replace(" linkdown", ""), programs)
}

#[test]
fn no_traces() {
    if skip_without_netns_cookie() {
        return;
    }
    with_each_backend(|backend| {
        let env = TestEnv::new();
        let (_routed, bridged) = add_pods(&env);
        let _agent = env.agent().config(&exempt(&bridged)).backend(backend).hooks(&ALL).spawn_ready();
        let (status, state) = (env.status(), state_of(&env));
        assert_all_passed(&verify(&env));
        assert_eq!(state_of(&env), state);
        let after = env.status_when("the test link is forgotten", |after| {
            after.interfaces.len() == status.interfaces.len()
        });
        assert_eq!((after.total, after.deleted), (status.total, status.deleted));
        for command in [&["report", "-o", "json"][..], &["report", "--rules"]] {
            let output = String::from_utf8(env.imds_agent(command).output().stdout).unwrap();
            assert!(!output.contains("imdsv") && !output.contains("imds-netns"), "{output}");
        }
        let events = env.imds_agent(&["events", "--no-follow", "--since", "1h"]).output();
        assert!(events.status.success() && events.stdout.is_empty(), "{events:?}");
        let denials = env.imds_agent(&["report", "-o", "json"]).output().stdout;
        let denials: serde_json::Value = serde_json::from_slice(&denials).unwrap();
        assert_eq!(denials["denials"].as_array().map(Vec::len), Some(0), "{denials:#}");
    });
}

/// The host-side veth of the test pod shows on the node that a run is active.
#[test]
fn signals_leave_nothing() {
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGKILL] {
        let env = TestEnv::new();
        let (_routed, _bridged) = add_pods(&env);
        let agent = env.agent().hooks(&["from_pod", "node_egress"]).spawn_ready();
        let before = state_of(&env);
        // `verify` waits while the agent is stopped.
        let agent_pid = Pid::from_raw(agent.pid().try_into().unwrap());
        kill(agent_pid, Signal::SIGSTOP).unwrap();
        let mut command = env.imds_agent(&["verify"]).command();
        let mut child = command.stderr(Stdio::null()).spawn().unwrap();
        let name = format!("imdsv{}", child.id());
        poll_until(LONG, "the link", || interfaces(&env.node).contains(&name).then_some(()));
        kill(Pid::from_raw(child.id().try_into().unwrap()), signal).unwrap();
        let status = child.wait().unwrap();
        if signal == Signal::SIGKILL {
            // The kernel destroys the contents of a namespace asynchronously.
            poll_until(LONG, "the end of the link", || {
                (!interfaces(&env.node).contains(&name)).then_some(())
            });
        } else {
            assert_eq!(status.code(), Some(1), "{signal}");
        }
        assert_nothing_left(&env);
        assert_eq!(state_of(&env), before);
        kill(agent_pid, Signal::SIGCONT).unwrap();
        drop(agent);
    }
}

#[test]
fn busy_machine() {
    run_beside_load(scaled(20));
}

/// Runs for an hour: `cargo test -p imds-tests --test verify -- --ignored soak`
#[test]
#[ignore = "takes an hour"]
fn soak() {
    run_beside_load(400);
}

/// Runs `verify` repeatedly while two threads per CPU keep the machine busy.
fn run_beside_load(runs: u32) {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let (_routed, bridged) = add_pods(&env);
    let _agent = env.agent().config(&exempt(&bridged)).hooks(&ALL).spawn_ready();
    let is_over = AtomicBool::new(false);
    let threads = thread::available_parallelism().unwrap().get() * 2;
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    spin_loop();
                }
            });
        }
        for run in 1..=runs {
            let verified = verify(&env);
            let is_right = verified.0.status.success();
            if !is_right {
                is_over.store(true, Ordering::Relaxed);
            }
            assert!(is_right, "run {run}: {:#}", verified.1);
        }
        is_over.store(true, Ordering::Relaxed);
    });
}
