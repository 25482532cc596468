//! Rules of the node that drop test packets, or change fields on which exemptions rely.

use std::{io::Write as _, process::Stdio};

use imds_tests::{METADATA, PodLink, TestEnv, skip_without_netns_cookie};

use crate::{
    ALL, add_pods, assert_all_passed, assert_fails, assert_passed, exempt, hooks_with, path_of, verify,
};

const TC_HOOKS: [&str; 2] = ["from_pod", "node_egress"];

/// Adds a chain with this rule at this netfilter hook.
fn nft(env: &TestEnv, hook: &str, rule: &str) {
    let script =
        format!("table ip test {{ chain {hook} {{ type filter hook {hook} priority 0; {rule}; }}\n}}\n");
    let mut nft = env.node.command("nft").args(["-f", "-"]).stdin(Stdio::piped()).spawn().unwrap();
    nft.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
    assert!(nft.wait().unwrap().success(), "{script}");
}

#[test]
fn overwritten_mark_fails() {
    let env = TestEnv::new();
    let (_routed, bridged) = add_pods(&env);
    let _agent = env.agent().config(&exempt(&bridged)).hooks(&TC_HOOKS).spawn_ready();
    assert_all_passed(&verify(&env));
    nft(&env, "forward", "meta mark set 0");
    let verified = verify(&env);
    assert_fails(&verified, &["path"]);
    let [(outcome, observed)] = &path_of(&verified.1, "exempt pod on cni0")[..] else {
        panic!("{:#}", verified.1)
    };
    assert!(outcome == "failed" && observed.contains("exemption mark"), "{observed}");
    // A routed pod is identified by its interface.
    assert_eq!(path_of(&verified.1, "exempt pod")[0].0, "passed");
}

#[test]
fn dropped_exempt_pod_fails() {
    let rule = format!("ip daddr {METADATA} tcp dport 80 drop");
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    nft(&env, "forward", &rule);
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
    nft(&env, "output", &format!("ip daddr {METADATA} drop"));
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
