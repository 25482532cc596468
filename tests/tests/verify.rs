//! `verify` proves what holds, says what does not, and leaves nothing behind.

use std::{fs, process::Output};

use imds_tests::{
    Netns, PodLink, World,
    foreign::{Foreign, TC_ACT_OK, detach_link},
    poll::poll_until,
    probe::LONG,
    skip_without_netns_cookie, with_each_backend,
};
use serde_json::Value;

const ALL: [&str; 3] = ["from_pod", "node_egress", "socket"];
/// A cloud with endpoints of both families, and one with kept services besides.
const AWS: &str = "provider = 'aws'";
const KEPT: &str = "answer = 'reject'\nprovider = 'none'\n\
    [[endpoint]]\nname = 'dns'\naddress = '169.254.169.254'\nkeep = ['udp/53', 'tcp/80']";

/// Verifies from within the guarded cgroup, unless told otherwise.
fn verify(world: &World) -> (Output, Value) {
    world.in_cgroup(|| verify_here(world))
}

fn verify_here(world: &World) -> (Output, Value) {
    let output = world.imds_agent(&["verify", "-o", "json"]).output();
    let report = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
    assert_nothing_left(world);
    (output, report)
}

fn interfaces(netns: &Netns) -> Vec<String> {
    netns.run(|| {
        let interfaces = nix::net::if_::if_nameindex().unwrap();
        interfaces.iter().map(|interface| interface.name().to_string_lossy().into_owned()).collect()
    })
}

#[track_caller]
fn assert_nothing_left(world: &World) {
    let left = interfaces(&world.node).into_iter().find(|name| name.starts_with("imdsv"));
    assert_eq!(left, None);
}

fn checks<'a>(report: &'a Value, hook: &str) -> Vec<&'a Value> {
    let checks = report["checks"].as_array().unwrap_or_else(|| panic!("{report:#}"));
    checks.iter().filter(|check| check["hook"] == hook).collect()
}

/// Hooks with a check that does not hold.
fn failed(report: &Value) -> Vec<&str> {
    let checks = report["checks"].as_array().unwrap_or_else(|| panic!("{report:#}")).iter();
    let mut hooks: Vec<_> =
        checks.filter(|check| check["ok"] == false).filter_map(|check| check["hook"].as_str()).collect();
    hooks.dedup();
    hooks
}

#[track_caller]
fn assert_held((output, report): &(Output, Value)) {
    assert_eq!(output.status.code(), Some(0), "{report:#}\n{output:?}");
    assert_eq!((report["schema"].as_u64(), report["held"].as_bool()), (Some(1), Some(true)));
    assert!(failed(report).is_empty());
}

#[track_caller]
fn assert_fails((output, report): &(Output, Value), hooks: &[&str]) {
    assert_eq!(output.status.code(), Some(3), "{report:#}\n{output:?}");
    assert_eq!(report["held"], false);
    assert_eq!(failed(report), hooks, "{report:#}");
}

#[test]
fn every_hook_is_proven_for_every_endpoint() {
    if skip_without_netns_cookie() {
        return;
    }
    with_each_backend(|backend| {
        let world = World::new().with_ipv6();
        let _pod = world.add_pod(PodLink::Routed);
        let before = interfaces(&world.node);
        let _agent = world.agent().config(AWS).backend(backend).hooks(&ALL).spawn_ready();
        let verified = verify(&world);
        assert_held(&verified);
        for hook in ALL {
            // One of the hook as a whole, one for each address.
            assert_eq!(checks(&verified.1, hook).len(), 3, "{:#}", verified.1);
        }
        assert_eq!(checks(&verified.1, "node").len(), 2);
        assert_eq!(interfaces(&world.node), before);
        world.status_when("all is well", |status| status.is_ready() && status.state == "enforcing");
    });
}

#[test]
fn kept_services_are_proven_to_be() {
    let world = World::new();
    let _agent = world.agent().config(KEPT).hooks(&["from_pod", "node_egress"]).spawn_ready();
    let verified = verify(&world);
    assert_held(&verified);
    for hook in ["from_pod", "node_egress"] {
        let found: Vec<_> = checks(&verified.1, hook)
            .iter()
            .map(|check| (check["service"].as_str(), check["found"].as_str().unwrap()))
            .skip(1)
            .collect();
        let kept = "let through, counted as kept";
        assert_eq!(found, [(None, "denied"), (Some("udp/53"), kept), (Some("tcp/80"), kept)]);
    }
}

#[test]
fn the_table_has_a_row_for_each() {
    let world = World::new();
    let _agent = world.agent().hooks(&["from_pod"]).spawn_ready();
    let output = world.imds_agent(&["verify"]).output();
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert!(text.contains("169.254.169.254") && text.contains("all 3 checks hold"), "{text}");
}

#[test]
fn audit_is_no_proof() {
    if skip_without_netns_cookie() {
        return;
    }
    let world = World::new();
    let _agent = world.agent().config("mode = 'audit'").hooks(&ALL).spawn_ready();
    let verified = verify(&world);
    assert_fails(&verified, &ALL);
    for hook in ALL {
        let found = checks(&verified.1, hook)[1]["found"].as_str().unwrap();
        assert!(found.contains("let through, counted as audited"), "{hook}: {found}");
    }
}

#[test]
fn a_link_that_is_not_guarded_is_named() {
    with_each_backend(|backend| {
        let world = World::new();
        let pod = world.add_pod(PodLink::Routed);
        let agent = world.agent().backend(backend).resync(3600).hooks(&["from_pod"]).spawn_ready();
        match backend {
            imds_tests::AttachMode::Tcx => {
                detach_link(&world.pin_dir().join(format!("links/from_pod_{}", pod.host_ifindex)));
            }
            // A removed filter would be noticed at once by an agent that runs.
            imds_tests::AttachMode::Clsact => {
                agent.kill9();
                imds_tests::hook::run_tc(
                    &world.node,
                    &["qdisc", "delete", "dev", &pod.host_ifname, "clsact"],
                );
            }
        }
        let verified = verify(&world);
        assert_fails(&verified, &["from_pod"]);
        let found = checks(&verified.1, "from_pod")[0]["found"].to_string();
        assert!(found.contains(&pod.host_ifname), "{found}");
    });
}

#[test]
fn without_an_agent_new_links_are_not_proven_to_be_guarded() {
    let world = World::new();
    world.agent().hooks(&["from_pod", "node_egress"]).spawn_ready().kill9();
    let verified = verify(&world);
    assert_fails(&verified, &["from_pod", "node_egress"]);
    let found = checks(&verified.1, "from_pod")[1]["found"].to_string();
    assert!(found.contains("imds-agent run"), "{found}");
}

#[test]
fn a_program_that_gets_in_front_fails_it() {
    if imds_tests::skip_without_tcx() {
        return;
    }
    let world = World::new();
    let pod = world.add_pod(PodLink::Routed);
    let _agent = world.agent().resync(3600).hooks(&["from_pod"]).spawn_ready();
    let hook = aya::programs::tc::TcAttachType::Ingress;
    let _link = Foreign::returning(TC_ACT_OK).attach_tcx_first(&world.node, pod.host_ifindex, hook);
    assert_fails(&verify(&world), &["from_pod"]);
}

#[test]
fn sockets_that_are_not_guarded_fail_it() {
    if skip_without_netns_cookie() {
        return;
    }
    let world = World::new();
    let _agent = world.agent().resync(3600).hooks(&["socket"]).spawn_ready();
    assert_held(&verify(&world));
    let elsewhere = verify_here(&world);
    assert_fails(&elsewhere, &["socket"]);
    let found = checks(&elsewhere.1, "socket")[1]["found"].to_string();
    assert!(found.contains("outside of the cgroup"), "{found}");

    detach_link(&world.pin_dir().join("links/connect4"));
    let verified = verify(&world);
    assert_fails(&verified, &["socket"]);
    let found = checks(&verified.1, "socket")[1]["found"].to_string();
    assert!(found.contains("connect not refused"), "{found}");
}

#[test]
fn strict_mode_is_proven_from_within_the_pods_cgroup() {
    const STRICT: &str = "host_network";
    if skip_without_netns_cookie() {
        return;
    }
    let world = World::new().with_ipv6();
    let agent = world.agent().config(AWS).resync(3600).hooks(&[STRICT]).spawn();
    agent.wait_for_log("hostNetwork pods are not held", LONG);
    let nowhere = verify(&world);
    assert_fails(&nowhere, &[STRICT]);

    let pods = world.add_cgroup("kubepods.slice");
    world.status_when("the cgroup is guarded", |status| {
        status.host_network.as_ref().is_some_and(|hosts| hosts.attached)
    });
    let verified = verify(&world);
    assert_held(&verified);
    let found: Vec<_> = checks(&verified.1, STRICT).iter().map(|check| check["found"].to_string()).collect();
    assert!(found.len() == 3 && found[1..].iter().all(|found| found.contains("refused")), "{found:?}");

    detach_link(&world.pin_dir().join(format!("links/host_connect4_{}", pods.id())));
    let verified = verify(&world);
    assert_fails(&verified, &[STRICT]);
    let found = checks(&verified.1, STRICT)[1]["found"].to_string();
    assert!(found.contains("not refused"), "{found}");
    let left = fs::read_dir(pods.path()).unwrap().flatten().filter(|entry| entry.path().is_dir()).count();
    assert_eq!(left, 0);
    drop(agent);
}

#[test]
fn where_nothing_is_loaded_it_says_what_to_do() {
    let world = World::new();
    let (output, _) = verify(&world);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("imds-agent run") && !world.pin_dir().exists(), "{stderr}");
}

/// Which namespace it made can be seen from outside only by the interfaces of the node: a pod's link that is gone.
#[test]
fn whatever_ends_it_nothing_is_left() {
    use nix::{
        sys::signal::{Signal, kill},
        unistd::Pid,
    };
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGKILL] {
        let world = World::new();
        let agent = world.agent().hooks(&["from_pod", "node_egress"]).spawn_ready();
        // An agent that does not follow keeps it waiting.
        let of_agent = Pid::from_raw(agent.pid().try_into().unwrap());
        kill(of_agent, Signal::SIGSTOP).unwrap();
        let mut command = world.imds_agent(&["verify"]).command();
        let mut child = command.stderr(std::process::Stdio::null()).spawn().unwrap();
        let name = format!("imdsv{}", child.id());
        poll_until(LONG, "the link to be there", || interfaces(&world.node).contains(&name).then_some(()));
        kill(Pid::from_raw(child.id().try_into().unwrap()), signal).unwrap();
        let status = child.wait().unwrap();
        if signal == Signal::SIGKILL {
            // The kernel removes what a namespace had when it comes to it.
            poll_until(LONG, "the link to be gone", || {
                (!interfaces(&world.node).contains(&name)).then_some(())
            });
        } else {
            assert_eq!(status.code(), Some(1), "{signal}");
        }
        assert_nothing_left(&world);
        kill(of_agent, Signal::SIGCONT).unwrap();
        drop(agent);
    }
}
