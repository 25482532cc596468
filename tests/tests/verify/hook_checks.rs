//! `verify` with each hook alone.

use std::fs;

use imds_tests::{
    AttachMode, PodLink, TestEnv,
    foreign_bpf::{ForeignProgram, TC_ACT_OK, detach_link},
    hook::run_tc,
    probe::LONG,
    skip_without_netns_cookie, skip_without_tcx, with_each_backend,
};

use crate::{
    ALL, AWS, add_pods, assert_all_passed, assert_fails, assert_passed, checks, exempt, interfaces, path_of,
    verify, verify_here,
};

const ALLOWED: &str = "on_deny = 'reject'\nprovider = 'none'\n\
    [[endpoint]]\nname = 'dns'\naddress = '169.254.169.254'\nallow_ports = ['udp/53', 'tcp/80']";

#[test]
fn all_hooks_and_paths_pass() {
    if skip_without_netns_cookie() {
        return;
    }
    with_each_backend(|backend| {
        let env = TestEnv::new().with_ipv6();
        let (_routed, bridged) = add_pods(&env);
        let before = interfaces(&env.node);
        let config = format!("{AWS}\n{}", exempt(&bridged));
        let _agent = env.agent().config(&config).backend(backend).hooks(&ALL).spawn_ready();
        let verified = env.assert_nothing_arrives(|| verify(&env));
        assert_all_passed(&verified);
        for hook in ALL {
            // One check of the hook as a whole, and one for each address.
            assert_eq!(checks(&verified.1, hook).len(), 3, "{:#}", verified.1);
        }
        for sender in ["pod", "exempt pod", "exempt pod on cni0", "node"] {
            assert_eq!(path_of(&verified.1, sender).len(), 2, "{sender}: {:#}", verified.1);
        }
        assert_eq!(interfaces(&env.node), before);
        env.status_when("the agent is ready", |status| status.is_ready() && status.state == "enforcing");
    });
}

#[test]
fn allowed_ports_pass() {
    let env = TestEnv::new();
    let _pod = env.add_pod(PodLink::Routed);
    let _agent = env.agent().config(ALLOWED).hooks(&["from_pod", "node_egress"]).spawn_ready();
    let verified = env.assert_nothing_arrives(|| verify(&env));
    assert_passed(&verified);
    for hook in ["from_pod", "node_egress"] {
        let found: Vec<_> = checks(&verified.1, hook)
            .iter()
            .map(|check| (check["service"].as_str(), check["observed"].as_str().unwrap()))
            .skip(1)
            .collect();
        let allowed = "not denied, an allowed port";
        assert_eq!(found, [(None, "denied"), (Some("udp/53"), allowed), (Some("tcp/80"), allowed)]);
    }
}

#[test]
fn table() {
    let env = TestEnv::new();
    let _pod = env.add_pod(PodLink::Routed);
    let _agent = env.agent().hooks(&["from_pod"]).spawn_ready();
    let output = env.imds_agent(&["verify"]).output();
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert!(text.contains("169.254.169.254") && text.contains("5 checks: 5 passed, 0 failed"), "{text}");
}

#[test]
fn audit_fails() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let _pod = env.add_pod(PodLink::Routed);
    let _agent = env.agent().config("mode = 'audit'").hooks(&ALL).spawn_ready();
    let verified = env.assert_nothing_arrives(|| verify(&env));
    assert_fails(&verified, &["from_pod", "node_egress", "socket", "path"]);
    for hook in ALL {
        let observed = checks(&verified.1, hook)[1]["observed"].as_str().unwrap();
        assert!(observed.contains("counted as audited"), "{hook}: {observed}");
    }
    assert_eq!(path_of(&verified.1, "pod")[0].1, "reached it");
}

#[test]
fn interface_without_program_fails() {
    with_each_backend(|backend| {
        let env = TestEnv::new();
        let pod = env.add_pod(PodLink::Routed);
        let agent = env.agent().backend(backend).resync(3600).hooks(&["from_pod"]).spawn_ready();
        match backend {
            AttachMode::Tcx => {
                detach_link(&env.pin_dir().join(format!("links/from_pod_{}", pod.host_ifindex)));
            }
            // A running agent repairs a removed filter immediately.
            AttachMode::Clsact => {
                agent.kill9();
                run_tc(&env.node, &["qdisc", "delete", "dev", &pod.host_ifname, "clsact"]);
            }
        }
        let verified = verify(&env);
        assert_fails(&verified, &["from_pod"]);
        let observed = checks(&verified.1, "from_pod")[0]["observed"].to_string();
        assert!(observed.contains(&pod.host_ifname), "{observed}");
    });
}

#[test]
fn no_interfaces_fail() {
    // The uplink is a veth, which the agent cannot distinguish from a pod interface.
    let config = format!("[interfaces]\nexclude = ['{}']", TestEnv::UPLINK);
    let env = TestEnv::new();
    let _agent = env.agent().config(&config).hooks(&["from_pod"]).spawn_ready();
    let verified = verify(&env);
    assert_fails(&verified, &["from_pod"]);
    let observed = checks(&verified.1, "from_pod")[0]["observed"].to_string();
    assert!(observed.contains("at 0 of 0"), "{observed}");
    // A pod adds an interface to check.
    let _pod = env.add_pod(PodLink::Routed);
    assert_passed(&verify(&env));
}

#[test]
fn excluded_uplink_fails() {
    let config = format!("[interfaces]\nexclude = ['{}']", TestEnv::UPLINK);
    let env = TestEnv::new();
    let _pod = env.add_pod(PodLink::Routed);
    let _agent = env.agent().config(&config).hooks(&["from_pod", "node_egress"]).spawn_ready();
    let verified = verify(&env);
    assert_fails(&verified, &["node_egress"]);
    let observed = checks(&verified.1, "node_egress")[0]["observed"].as_str().unwrap();
    assert_eq!(observed, format!("uplink {} is excluded", TestEnv::UPLINK));
}

#[test]
fn no_agent_fails() {
    let env = TestEnv::new();
    let _pod = env.add_pod(PodLink::Routed);
    env.agent().hooks(&["from_pod", "node_egress"]).spawn_ready().kill9();
    let verified = verify(&env);
    assert_fails(&verified, &["from_pod"]);
    let observed = checks(&verified.1, "from_pod")[1]["observed"].to_string();
    assert!(observed.contains("imds-agent run"), "{observed}");
}

#[test]
fn program_in_front_fails() {
    if skip_without_tcx() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let _agent = env.agent().resync(3600).hooks(&["from_pod"]).spawn_ready();
    let hook = aya::programs::tc::TcAttachType::Ingress;
    let _link = ForeignProgram::returning(TC_ACT_OK).attach_tcx_first(&env.node, pod.host_ifindex, hook);
    assert_fails(&verify(&env), &["from_pod"]);
}

#[test]
fn detached_socket_hook_fails() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let _agent = env.agent().resync(3600).hooks(&["socket"]).spawn_ready();
    assert_passed(&verify(&env));
    let elsewhere = verify_here(&env);
    assert_fails(&elsewhere, &["socket"]);
    let observed = checks(&elsewhere.1, "socket")[1]["observed"].to_string();
    assert!(observed.contains("outside of the cgroup"), "{observed}");

    detach_link(&env.pin_dir().join("links/connect4"));
    let verified = verify(&env);
    assert_fails(&verified, &["socket"]);
    let observed = checks(&verified.1, "socket")[1]["observed"].to_string();
    assert!(observed.contains("connect not refused"), "{observed}");
}

#[test]
fn host_network_hook() {
    const HOOK: &str = "host_network";
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new().with_ipv6();
    let agent = env.agent().config(AWS).resync(3600).hooks(&[HOOK]).spawn();
    agent.wait_for_log("hostNetwork pods are not restricted", LONG);
    // The agent logs the line during its initial sync.
    env.status_when("the agent is ready", |status| status.agent.ready);
    let without_cgroup = verify(&env);
    assert_fails(&without_cgroup, &[HOOK]);

    let pods = env.add_cgroup("kubepods.slice");
    env.status_when("the programs are attached", |status| {
        status.host_network.as_ref().is_some_and(|hosts| hosts.attached)
    });
    let verified = verify(&env);
    assert_passed(&verified);
    let observed: Vec<_> =
        checks(&verified.1, HOOK).iter().map(|check| check["observed"].to_string()).collect();
    assert!(observed.len() == 3 && observed[1..].iter().all(|text| text.contains("refused")), "{observed:?}");

    detach_link(&env.pin_dir().join(format!("links/host_connect4_{}", pods.id())));
    let verified = verify(&env);
    assert_fails(&verified, &[HOOK]);
    let observed = checks(&verified.1, HOOK)[1]["observed"].to_string();
    assert!(observed.contains("not refused"), "{observed}");
    let left = fs::read_dir(pods.path()).unwrap().flatten().filter(|entry| entry.path().is_dir()).count();
    assert_eq!(left, 0);
    drop(agent);
}

#[test]
fn unloaded_fails() {
    let env = TestEnv::new();
    let (output, _) = verify(&env);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("imds-agent run") && !env.pin_dir().exists(), "{stderr}");
}
