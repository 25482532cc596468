//! Pods of the reference CNI plugins. Each plugin is called as a container runtime calls it.

use std::{net::Ipv4Addr, sync::Arc, thread, time::Duration};

use imds_tests::{
    CniNetwork, CniPod, METADATA, Netns, SERVICE, Services, StopFlag, TestEnv, WHOLE_TEST,
    cni::plugin,
    known_here, lacks_device, lacks_program, lacks_tc_netns_cookie,
    probe::{LONG, Outcome, SHORT, http_get, http_get_at, reachable, udp_echo},
};
use serde_json::{Value, json};

use crate::{ALL, PACKETS, assert_exempt, exemption, reaches};

const PTP: &str = "10.244.200.0/24";
const BRIDGE: &str = "10.244.201.0/24";

pub(crate) fn ptp<'w>(env: &'w TestEnv, chained: &[Value]) -> CniNetwork<'w> {
    let plugins = [&[json!({ "type": "ptp", "ipMasq": true })], chained].concat();
    env.cni_network(&json!({ "subnet": PTP }), &plugins)
}

pub(crate) fn bridge<'w>(env: &'w TestEnv, chained: &[Value]) -> CniNetwork<'w> {
    let bridge = json!({ "type": "bridge", "bridge": "cni9", "isGateway": true, "ipMasq": true });
    env.cni_network(&json!({ "subnet": BRIDGE }), &[&[bridge], chained].concat())
}

/// Returns a network of macvlan pods, which are neighbours of the node. The fabric is their gateway, and the node has
/// no interface of their own.
fn macvlan(env: &TestEnv) -> CniNetwork<'_> {
    let addresses = json!({ "subnet": "10.0.0.0/24", "rangeStart": "10.0.0.64", "gateway": "10.0.0.1" });
    env.cni_network(&addresses, &[json!({ "type": "macvlan", "master": TestEnv::UPLINK })])
}

/// Sends to the endpoint every millisecond until `stop` is set, also before the namespace has an interface.
pub(crate) fn send_until(netns: &Netns, stop: &StopFlag) {
    const INTERVAL: Duration = Duration::from_millis(1);
    while !stop.is_set() {
        if !matches!(udp_echo(netns, METADATA, INTERVAL), Outcome::Timeout) {
            // The network is unreachable, and the probe returned at once.
            thread::sleep(INTERVAL);
        }
    }
}

/// Connects a pod that sends to the endpoint continuously, and asserts that no packet arrives.
#[track_caller]
fn assert_denied_from_the_start<'n>(env: &TestEnv, network: &'n CniNetwork<'_>) -> CniPod<'n> {
    let (netns, stop) = (Arc::new(Netns::new("cni")), StopFlag::default());
    env.assert_nothing_arrives(|| {
        thread::scope(|scope| {
            let _stop_on_drop = stop.set_on_drop();
            scope.spawn(|| send_until(&netns, &stop));
            let pod = network.connect(Arc::clone(&netns)).unwrap_or_else(|error| panic!("{error}"));
            assert!(reachable(&pod.netns, SERVICE));
            assert!(!http_get(&pod.netns, METADATA, SHORT).is_answer());
            pod
        })
    })
}

/// Asserts that each of `hooks` alone denies pods of a network: pods from before the agent and later ones, denied and
/// exempt ones.
#[track_caller]
fn assert_plugin(env: &TestEnv, network: &CniNetwork<'_>, hooks: &[&'static str]) {
    let [pod, exempt] = [network.add_pod(), network.add_pod()];
    env.vectors(hooks)
        .vector("TCP", || http_get(&pod.netns, METADATA, SHORT).is_answer())
        .vector("UDP", || udp_echo(&pod.netns, METADATA, SHORT).is_answer())
        .assert_blocked_all();

    let selector = format!("netns = '{}'", exempt.netns.path().display());
    assert_exempt(env, &exemption(&selector), Some(&exempt.netns), &[&pod.netns]);
    if let Some(veth) = &exempt.host_ifname {
        let selector = format!("interface = '{veth}'");
        assert_exempt(env, &exemption(&selector), Some(&exempt.netns), &[&pod.netns]);
    }

    for hooks in [ALL, PACKETS] {
        let agent = env.agent().hooks(&known_here(hooks)).spawn_ready();
        let later = assert_denied_from_the_start(env, network);
        later.delete();
        drop(agent);
        env.unload();
    }
    for pod in [pod, exempt] {
        assert!(reaches(env, &pod.netns));
        pod.delete();
    }
}

#[test]
fn ptp_pods() {
    if lacks_program(WHOLE_TEST, &[&plugin("ptp"), "iptables"]) {
        return;
    }
    let env = TestEnv::new();
    assert_plugin(&env, &ptp(&env, &[]), ALL);
}

#[test]
fn bridge_pods() {
    if lacks_program(WHOLE_TEST, &[&plugin("bridge"), "iptables"]) {
        return;
    }
    let env = TestEnv::new();
    assert_plugin(&env, &bridge(&env, &[]), ALL);
}

#[test]
fn macvlan_pods() {
    if lacks_program(WHOLE_TEST, &[&plugin("macvlan")])
        || lacks_device(WHOLE_TEST, "macvlan", "link lower0 type macvlan mode bridge")
        || lacks_tc_netns_cookie(WHOLE_TEST)
    {
        return;
    }
    let env = TestEnv::new();
    assert_plugin(&env, &macvlan(&env), &["node_egress", "socket"]);
}

#[test]
fn portmap_and_tuning() {
    const HOST_PORT: u16 = 8080;
    if lacks_program(WHOLE_TEST, &[&plugin("ptp"), "iptables"]) {
        return;
    }
    let chained = [
        json!({
            "type": "portmap",
            "snat": true,
            "capabilities": { "portMappings": true },
            "runtimeConfig": {
                "portMappings": [{ "hostPort": HOST_PORT, "containerPort": 80, "protocol": "tcp" }],
            },
        }),
        json!({ "type": "tuning", "sysctl": { "net.core.somaxconn": "500" }, "mac": "02:42:0a:f4:c8:99" }),
    ];
    for make in [ptp, bridge] {
        let env = TestEnv::new();
        let network = make(&env, &chained);
        let agent = env.agent().hooks(&known_here(ALL)).spawn_ready();
        let pod = assert_denied_from_the_start(&env, &network);
        assert_host_port(&env, &pod, HOST_PORT);
        agent.kill9();
        env.unload();
        assert!(reaches(&env, &pod.netns));
        assert_host_port(&env, &pod, HOST_PORT);
        pod.delete();
    }
}

/// Asserts that the fabric reaches a server in the pod through a port of the node.
#[track_caller]
fn assert_host_port(env: &TestEnv, pod: &CniPod<'_>, port: u16) {
    let _server = Services::start(&pod.netns, &[Ipv4Addr::UNSPECIFIED.into()]);
    assert!(http_get_at(&env.fabric, (env.node_address(), port).into(), LONG).is_answer());
}
