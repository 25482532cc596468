//! Rules of the node that drop test packets, or change fields on which exemptions rely.

use std::{io::Write as _, net::TcpListener, process::Stdio};

use imds_tests::{
    AttachMode, METADATA, PodLink, TestEnv, foreign_bpf::ForeignProgram, hook::run_tc,
    skip_without_netns_cookie,
};

use crate::{
    ALL, AWS, add_pods, assert_all_passed, assert_fails, assert_passed, exempt, hooks_with, path_of, verify,
};

const FORWARD: &str = "filter hook forward";
const TC_HOOKS: [&str; 2] = ["from_pod", "node_egress"];

/// Adds a chain of this type and netfilter hook with this rule.
fn nft(env: &TestEnv, kind: &str, rule: &str) {
    let script = format!("table ip test {{ chain test {{ type {kind} priority 0; {rule}; }}\n}}\n");
    let mut nft = env.node.command("nft").args(["-f", "-"]).stdin(Stdio::piped()).spawn().unwrap();
    nft.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
    assert!(nft.wait().unwrap().success(), "{script}");
}

/// Makes the kernel compute the hash of packets of this protocol from `cni0` again.
fn reset_hashes(env: &TestEnv, protocol: &str) {
    let program = ForeignProgram::setting_hash(None);
    run_tc(&env.node, &["qdisc", "add", "dev", "cni0", "clsact"]);
    let pinned = ["bpf", "direct-action", "pinned", program.pin().to_str().unwrap()];
    run_tc(
        &env.node,
        &[&["filter", "add", "dev", "cni0", "ingress", "protocol", protocol][..], &pinned].concat(),
    );
}

#[test]
fn overwritten_hash_fails() {
    let env = TestEnv::new();
    let (_routed, bridged) = add_pods(&env);
    let _agent = env.agent().config(&exempt(&bridged)).hooks(&TC_HOOKS).spawn_ready();
    assert_all_passed(&verify(&env));
    reset_hashes(&env, "all");
    let verified = verify(&env);
    assert_fails(&verified, &["path"]);
    let [(outcome, observed)] = &path_of(&verified.1, "exempt pod on cni0")[..] else {
        panic!("{:#}", verified.1)
    };
    assert!(outcome == "failed" && observed.contains("changes the hash"), "{observed}");
    // A routed pod is identified by its interface.
    assert_eq!(path_of(&verified.1, "exempt pod")[0].0, "passed");
}

#[test]
fn hash_lost_for_one_family_fails() {
    let env = TestEnv::new().with_ipv6();
    let bridged = env.add_pod(PodLink::Bridged);
    let config = format!("{AWS}\n{}", exempt(&bridged));
    let _agent = env.agent().config(&config).hooks(&TC_HOOKS).spawn_ready();
    reset_hashes(&env, "ip");
    let verified = verify(&env);
    assert_fails(&verified, &["path"]);
    let [(outcome, observed), of_ipv6] = &path_of(&verified.1, "exempt pod on cni0")[..] else {
        panic!("{:#}", verified.1)
    };
    assert!(outcome == "failed" && observed.contains("changes the hash"), "{observed}");
    assert_eq!(of_ipv6.0, "passed", "{}", of_ipv6.1);
}

#[test]
fn bridged_exemption_needs_from_pod() {
    let env = TestEnv::new();
    let (_routed, bridged) = add_pods(&env);
    let _agent = env.agent().config(&exempt(&bridged)).hooks(&["node_egress"]).spawn_ready();
    let verified = verify(&env);
    assert_fails(&verified, &["path"]);
    let (outcome, observed) = &path_of(&verified.1, "exempt pod on cni0")[0];
    assert!(outcome == "failed" && observed.contains("hooks.from_pod"), "{observed}");
    assert_eq!(path_of(&verified.1, "exempt pod")[0].0, "passed");
}

#[test]
fn redirected_node_calls_are_not_tested() {
    let env = TestEnv::new();
    let _pod = env.add_pod(PodLink::Routed);
    let _agent = env.agent().hooks(&TC_HOOKS).spawn_ready();
    let listener = env.node.run(|| TcpListener::bind((env.node_address(), 80)).unwrap());
    let rule = format!("ip daddr {METADATA} dnat to {}", env.node_address());
    nft(&env, "nat hook output", &rule);
    let verified = verify(&env);
    assert!(verified.0.status.success(), "{:#}", verified.1);
    let (outcome, observed) = &path_of(&verified.1, "node")[0];
    assert!(outcome == "skipped" && observed.contains("a rule of this node redirects"), "{observed}");
    drop(listener);
}

/// Filters that accept test packets, in clsact mode.
#[test]
fn filters_before_the_last_hook() {
    for (priority, failed) in [("1", &["node_egress"][..]), ("2", &[])] {
        let env = TestEnv::new();
        let (_routed, bridged) = add_pods(&env);
        run_tc(&env.node, &["qdisc", "add", "dev", TestEnv::UPLINK, "clsact"]);
        let filter = ["filter", "add", "dev", TestEnv::UPLINK, "egress", "protocol", "all", "prio", priority];
        run_tc(&env.node, &[&filter[..], &["u32", "match", "u32", "0", "0", "classid", "1:1"]].concat());
        let agent = env.agent().config(&exempt(&bridged)).backend(AttachMode::Clsact).hooks(&TC_HOOKS);
        let _agent = agent.spawn();
        env.status_when("the agent is ready", |status| {
            status.agent.ready && status.has_attached(TestEnv::UPLINK, "node_egress")
        });
        let verified = env.assert_nothing_arrives(|| verify(&env));
        if failed.is_empty() {
            assert_passed(&verified);
        } else {
            assert_fails(&verified, failed);
        }
        for sender in ["node", "exempt pod"] {
            let (outcome, observed) = &path_of(&verified.1, sender)[0];
            assert!(outcome == "skipped" && observed.contains("before the last hook"), "{observed}");
        }
    }
}

#[test]
fn dropped_exempt_pod_fails() {
    let rule = format!("ip daddr {METADATA} tcp dport 80 drop");
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    nft(&env, FORWARD, &rule);
    {
        let _agent = env.agent().hooks(&TC_HOOKS).spawn_ready();
        let verified = verify(&env);
        assert_passed(&verified);
        assert_eq!(path_of(&verified.1, "exempt pod")[0].0, "skipped");
    }
    let _agent = env.agent().config(&exempt(&pod)).hooks(&TC_HOOKS).spawn_ready();
    assert_fails(&verify(&env), &["path"]);
}

#[test]
fn dropped_node_packets_fail() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let _pod = env.add_pod(PodLink::Routed);
    let _agent = env.agent().hooks(&ALL).spawn_ready();
    nft(&env, "filter hook output", &format!("ip daddr {METADATA} drop"));
    let verified = verify(&env);
    assert_fails(&verified, &["path"]);
    assert_eq!(path_of(&verified.1, "node")[0].0, "failed");
}

#[test]
fn node_without_forwarding_is_skipped() {
    let env = TestEnv::new();
    let _pod = env.add_pod(PodLink::Routed);
    env.node.sysctl("ipv4/ip_forward", "0");
    let _agent = env.agent().hooks(&TC_HOOKS).spawn_ready();
    let verified = verify(&env);
    assert_passed(&verified);
    let (outcome, observed) = &path_of(&verified.1, "exempt pod")[0];
    assert!(outcome == "skipped" && observed.contains("does not forward test packets"), "{observed}");
    assert_eq!(hooks_with(&verified.1, "skipped"), ["path"]);
}

#[test]
fn unreachable_endpoint_is_skipped() {
    let env = TestEnv::new();
    let _pod = env.add_pod(PodLink::Routed);
    env.node.ip(&format!("route add unreachable {METADATA}/32"));
    let _agent = env.agent().hooks(&TC_HOOKS).spawn_ready();
    let verified = verify(&env);
    assert_passed(&verified);
    assert_eq!(path_of(&verified.1, "node")[0].0, "skipped", "{:#}", verified.1);
}
