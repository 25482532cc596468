//! `doctor` names foreign rules, devices and programs that let a packet or call bypass the agent.

use std::{io, process::Output};

use aya::programs::tc::TcAttachType;
use imds_tests::{
    Netns, PodLink, TestEnv, WHOLE_TEST, foreign_bpf::ForeignProgram, hook::run_tc, lacks_device, output,
    skip, skip_without_netns_cookie, skip_without_tcx,
};
use serde_json::Value;

/// TC action that leaves the packet to the next program.
const TC_ACT_UNSPEC: i32 = -1;
// Attach type of include/uapi/linux/bpf.h.
const BPF_CGROUP_INET4_CONNECT: u32 = 10;

#[track_caller]
fn checks(env: &TestEnv, name: &str) -> Vec<Value> {
    let output = env.imds_agent(&["doctor", "-o", "json"]).output();
    let report: Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"));
    let checks = report["checks"].as_array().unwrap();
    checks.iter().filter(|check| check["name"] == name).cloned().collect()
}

#[track_caller]
fn one(env: &TestEnv, name: &str) -> Value {
    let checks = checks(env, name);
    let [check] = &checks[..] else { panic!("{name}: {checks:#?}") };
    check.clone()
}

#[track_caller]
fn assert_has(check: &Value, key: &str, part: &str) {
    assert!(check[key].as_str().is_some_and(|text| text.contains(part)), "{part}: {check:#}");
}

#[track_caller]
fn succeeded(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[track_caller]
fn nft(netns: &Netns, arguments: &[&str]) -> String {
    let mut command = netns.command("nft");
    command.args(arguments);
    succeeded(&output(command))
}

/// Runs `iptables`. Returns false if it is not installed.
#[track_caller]
fn iptables(netns: &Netns, arguments: &str) -> bool {
    let mut command = netns.command("iptables");
    command.args(arguments.split(' '));
    match command.output() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        output => {
            succeeded(&output.unwrap());
            true
        }
    }
}

#[track_caller]
fn bpftool(netns: &Netns, arguments: &[&str]) {
    let mut command = netns.command("bpftool");
    command.args(arguments);
    succeeded(&output(command));
}

/// Loads the agent's programs with an exemption for the host-side interface of a pod.
#[track_caller]
fn load_with_exempt(env: &TestEnv, interface: &str) {
    let config = format!("[[exempt]]\nname = 'of-test'\ninterface = '{interface}'\n");
    let loaded = env.agent().hooks(&["from_pod", "node_egress"]).config(&config).once();
    assert!(loaded.status.success(), "{loaded:?}");
}

#[test]
fn nft_rules_writing_the_mark() {
    let env = TestEnv::new();
    let routed = env.add_pod(PodLink::Routed);
    assert_has(&one(&env, "mark_rules"), "observed", "none writes bit 12");
    nft(
        &env.node,
        &["add table inet other
           add chain inet other pre { type filter hook prerouting priority mangle; }
           add rule inet other pre meta mark set meta mark or 0x4000
           add rule inet other pre meta mark set meta mark or 0x1000
           add chain inet other out { type route hook output priority mangle; }
           add rule inet other out meta mark set 0x0"],
    );
    let found = checks(&env, "mark_rules");
    let effects: Vec<_> = found.iter().map(|check| check["mark"]["effect"].as_str().unwrap()).collect();
    assert_eq!(effects, ["set", "cleared"]);
    assert!(found.iter().all(|check| check["state"] == "ok"), "{found:#?}");
    assert_has(&found[0], "observed", "there is none");
    assert_eq!((&found[0]["mark"]["chain"], &found[0]["mark"]["bit"]), (&"pre".into(), &12.into()));

    // An exempt pod without a bridge is identified by its interface.
    load_with_exempt(&env, &routed.host_ifname);
    assert!(checks(&env, "mark_rules").iter().all(|check| check["state"] == "ok"));

    let bridged = env.add_pod(PodLink::Bridged);
    load_with_exempt(&env, &bridged.host_ifname);
    let [sets, clears] = &checks(&env, "mark_rules")[..] else { panic!("two rules") };
    assert_eq!((&sets["state"], &clears["state"]), (&"degraded".into(), &"ok".into()));
    assert_has(sets, "observed", "nft rule inet other pre handle");
    assert_has(sets, "remedy", "a pod behind cni0 that is not exempt can pass node_egress");
    assert_has(clears, "observed", "the node's own packets");
    nft(&env.node, &["delete", "table", "inet", "other"]);
    assert_eq!(one(&env, "mark_rules")["state"], "ok");
}

#[test]
fn iptables_rules_writing_the_mark() {
    let env = TestEnv::new();
    let bridged = env.add_pod(PodLink::Bridged);
    if !iptables(&env.node, "-t mangle -A PREROUTING -j MARK --or-mark 0x4000") {
        skip(WHOLE_TEST, "there is no iptables on this machine");
        return;
    }
    load_with_exempt(&env, &bridged.host_ifname);
    assert_has(&one(&env, "mark_rules"), "observed", "none writes bit 12");
    for (target, effect) in [
        ("MARK --set-mark 0x1000/0x1000", "set"),
        ("MARK --set-mark 0x10", "cleared"),
        ("CONNMARK --restore-mark", "changed"),
    ] {
        assert!(iptables(&env.node, &format!("-t mangle -A FORWARD -j {target}")));
        let check = one(&env, "mark_rules");
        assert_eq!((&check["state"], &check["mark"]["effect"]), (&"degraded".into(), &effect.into()));
        assert_eq!((&check["mark"]["table"], &check["mark"]["chain"]), (&"mangle".into(), &"FORWARD".into()));
        assert!(iptables(&env.node, &format!("-t mangle -D FORWARD -j {target}")));
    }
}

#[test]
fn gbp_tunnels_on_exempt_pod_bridge() {
    const VXLAN: &str = "type vxlan id 5 dstport 4789 gbp";
    if lacks_device(WHOLE_TEST, "vxlan", VXLAN) {
        return;
    }
    let env = TestEnv::new();
    let bridged = env.add_pod(PodLink::Bridged);
    assert_has(&one(&env, "mark_tunnels"), "observed", "no VXLAN device with gbp");
    env.node.ip(&format!("link add gbp0 {VXLAN}\nlink add plain0 type vxlan id 6 dstport 4790"));
    load_with_exempt(&env, &bridged.host_ifname);
    let alone = one(&env, "mark_tunnels");
    assert_eq!(alone["state"], "ok");
    assert_has(&alone, "observed", "gbp0 is a VXLAN device with gbp");
    env.node.ip(&format!("link set gbp0 master {}", TestEnv::BRIDGE));
    let port = one(&env, "mark_tunnels");
    assert_eq!(port["state"], "degraded");
    assert_has(&port, "remedy", "set the mark bit");
}

/// A program after `from_pod` can overwrite the mark.
#[test]
fn programs_after_from_pod_of_exempt_pod() {
    if skip_without_tcx() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Bridged);
    load_with_exempt(&env, &pod.host_ifname);
    assert_eq!(one(&env, "tc_programs")["state"], "ok");
    run_tc(&env.node, &["qdisc", "add", "dev", &pod.host_ifname, "clsact"]);
    ForeignProgram::returning(TC_ACT_UNSPEC).attach_filter(
        &env.node,
        &pod.host_ifname,
        TcAttachType::Ingress,
        1,
    );
    let check = one(&env, "tc_programs");
    assert_eq!(check["state"], "degraded", "{check:#}");
    assert_has(&check, "observed", "after the agent's");
    assert_has(&check, "remedy", "hooks.mark_bit");
    env.unload();
}

#[test]
fn routes_through_node_veth_pair() {
    let env = TestEnv::new();
    env.node.ip("link add pair0 type veth peer name pair1
        link set pair0 up
        link set pair1 up
        addr add 10.9.9.1/30 dev pair0");
    assert_eq!(one(&env, "node_pairs")["state"], "ok");
    env.node.ip("route add default via 10.9.9.2 dev pair0 table 100");
    let check = one(&env, "node_pairs");
    assert_eq!(check["state"], "degraded", "{check:#}");
    assert_has(&check, "observed", "through pair0 to pair1");
}

#[test]
fn xdp_programs_on_pod_links() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    assert_eq!(one(&env, "xdp_programs")["state"], "ok");
    let program = ForeignProgram::passing_frames();
    let pin = program.pin().to_str().unwrap();
    bpftool(&env.node, &["net", "attach", "xdpgeneric", "pinned", pin, "dev", &pod.host_ifname]);
    let found = one(&env, "xdp_programs");
    assert_eq!(found["state"], "degraded");
    assert_eq!((&found["program"]["kind"], &found["program"]["name"]), (&"xdp".into(), &"foreign".into()));
    assert_has(&found, "observed", &pod.host_ifname);
    assert_has(&found, "remedy", "XDP_REDIRECT");
    env.node.ip(&format!("link set dev {} xdpgeneric off", pod.host_ifname));
    assert_eq!(one(&env, "xdp_programs")["state"], "ok");
}

#[test]
fn cgroup_programs_after_the_agents() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let cgroup = env.cgroup().to_str().unwrap();
    let attach = |program: &ForeignProgram, hook: &str| {
        let pin = program.pin().to_str().unwrap();
        bpftool(&env.node, &["cgroup", "attach", cgroup, hook, "pinned", pin, "multi"]);
    };
    let before = ForeignProgram::allowing_calls(BPF_CGROUP_INET4_CONNECT);
    attach(&before, "connect4");
    let loaded = env.agent().hooks(&["socket"]).once();
    assert!(loaded.status.success(), "{loaded:?}");
    let found = one(&env, "cgroup_programs");
    assert_eq!((&found["state"], &found["program"]["first"]), (&"ok".into(), &true.into()));

    let after = ForeignProgram::allowing_calls(BPF_CGROUP_INET4_CONNECT);
    attach(&after, "connect4");
    let [first, last] = &checks(&env, "cgroup_programs")[..] else { panic!("two programs") };
    assert_eq!((&first["state"], &last["state"]), (&"ok".into(), &"degraded".into()));
    assert_eq!((&last["program"]["position"], &last["program"]["count"]), (&3.into(), &3.into()));
    assert_has(last, "remedy", "runs after imds_connect4: it may rewrite the destination");
}

#[test]
fn cgroup_programs_without_allow_multi() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let cgroup = env.cgroup().to_str().unwrap();
    let loaded = env.agent().hooks(&["socket"]).once();
    assert!(loaded.status.success(), "{loaded:?}");
    let others = ForeignProgram::passing_packets();
    let pin = others.pin().to_str().unwrap();
    let change = |action: &str, flags: &[&str]| {
        bpftool(&env.node, &[&["cgroup", action, cgroup, "ingress", "pinned", pin], flags].concat());
    };
    change("attach", &["multi"]);
    assert_eq!(one(&env, "cgroup_programs")["state"], "ok");
    change("detach", &[]);
    change("attach", &[]);
    let found = one(&env, "cgroup_programs");
    assert_eq!((&found["state"], &found["program"]["hook"]), (&"degraded".into(), &"ingress".into()));
    assert_has(&found, "observed", "without BPF_F_ALLOW_MULTI");
}
