//! Pods with an interface above the NIC. The node has no interface of its own for these pods.

use aya::programs::tc::TcAttachType;
use imds_ebpf_common::PASSED_HASH;
use imds_tests::{
    Layout, METADATA, Netns, Nic, TestEnv, WHOLE_TEST,
    foreign_bpf::ForeignProgram,
    hook::run_tc,
    known_here, lacks_device, lacks_tc_netns_cookie,
    poll::{poll_until, try_poll},
    probe::{LONG, SHORT, http_get, reachable, udp_echo},
};

use crate::fixture::NODE_EGRESS;

const SOCKET: &[&str] = &["socket"];

fn add_pod(env: &TestEnv, options: &str, host: u8) -> Netns {
    let pod = Netns::new("upper");
    let name = format!("upper{host}");
    env.node.ip(&format!("link add {name} link {} netns {} {options}", TestEnv::UPLINK, pod.name()));
    pod.ip(&format!(
        "link set lo up
         addr add 10.0.0.{host}/24 dev {name}
         link set {name} up
         route add default via 10.0.0.1"
    ));
    if options.contains("mode l3") {
        // The device answers no ARP requests.
        env.fabric.ip(&format!("route add 10.0.0.{host}/32 via {}", env.node_address()));
    }
    pod
}

fn reaches(env: &TestEnv, netns: &Netns) -> bool {
    env.in_cgroup(|| {
        http_get(netns, METADATA, SHORT).is_answer() && udp_echo(netns, METADATA, SHORT).is_answer()
    })
}

fn gets_any_answer(env: &TestEnv, netns: &Netns) -> bool {
    env.in_cgroup(|| {
        http_get(netns, METADATA, SHORT).is_answer() || udp_echo(netns, METADATA, SHORT).is_answer()
    })
}

fn assert_enforced(options: &str) {
    let env = TestEnv::new();
    let [exempt, denied] = [77, 78].map(|host| add_pod(&env, options, host));
    let all = [&exempt, &denied, &*env.node];
    let assert_open = |when: &str| {
        for netns in all {
            poll_until(LONG, &format!("responses to {} {when}", netns.name()), || {
                reaches(&env, netns).then_some(())
            });
        }
    };
    assert_open("without the agent");
    let mut runs = vec![known_here(SOCKET)];
    if !lacks_tc_netns_cookie("`node_egress`") {
        runs.push(NODE_EGRESS.to_vec());
    }
    for hooks in runs.iter().filter(|hooks| !hooks.is_empty()) {
        let rule = format!("[[exempt]]\nname = 'upper'\nnetns = '{}'\n", exempt.path().display());
        let agent = env.agent().hooks(hooks).config(&rule).spawn_ready();
        for (name, netns) in [("node", &*env.node), ("exempt pod", &exempt)] {
            let found = try_poll(LONG, || reaches(&env, netns).then_some(()));
            assert!(found.is_some(), "{name} with {hooks:?}: {}", agent.log());
        }
        let before = env.received_packets().from([10, 0, 0, 78]);
        assert!(!gets_any_answer(&env, &denied), "{hooks:?}: {}", agent.log());
        assert_eq!(env.received_packets().from([10, 0, 0, 78]), before, "{hooks:?}");
        drop(agent);
        env.unload();
        assert_open(&format!("after {hooks:?}"));
    }
}

#[test]
fn macvlan_pods() {
    if lacks_device(WHOLE_TEST, "macvlan", "link lower0 type macvlan mode bridge") {
        return;
    }
    for mode in ["bridge", "private"] {
        assert_enforced(&format!("type macvlan mode {mode}"));
    }
}

#[test]
fn ipvlan_pods() {
    if lacks_device(WHOLE_TEST, "ipvlan", "link lower0 type ipvlan mode l2") {
        return;
    }
    for mode in ["l2", "l3", "l3s"] {
        assert_enforced(&format!("type ipvlan mode {mode}"));
    }
}

/// macvlan devices clear neither the hash nor the ingress interface of a packet that the pod forwards.
#[test]
fn macvlan_pod_imitates_an_ifb() {
    let lacks = |device: &str| lacks_device(WHOLE_TEST, device, device);
    if lacks_device(WHOLE_TEST, "macvlan", "link lower0 type macvlan mode bridge") || lacks("type ifb") {
        return;
    }
    let env = TestEnv::with_layout(Layout::new(Nic::Veth).above("link add ifb0 type ifb", TestEnv::UPLINK));
    let index = env.node.run(|| nix::net::if_::if_nametoindex("ifb0").expect("the index of ifb0"));
    let pod = add_pod(&env, "type macvlan mode bridge", 77);
    let inner = Netns::new("inner");
    // The pod's interface has the index of the ifb.
    pod.ip(&format!(
        "link add in0 index {index} type veth peer name in1 netns {}
         link set in0 up
         addr add 172.29.0.1/24 dev in0",
        inner.name()
    ));
    inner.ip("link set in1 up\naddr add 172.29.0.2/24 dev in1\nroute add default via 172.29.0.1");
    pod.sysctl("ipv4/ip_forward", "1");
    env.fabric.ip("route add 172.29.0.0/24 via 10.0.0.77");
    let program = ForeignProgram::setting_hash(Some(PASSED_HASH));
    run_tc(&pod, &["qdisc", "add", "dev", "in0", "clsact"]);
    program.attach_filter(&pod, "in0", TcAttachType::Ingress, 1);
    poll_until(LONG, "responses without the agent", || reaches(&env, &inner).then_some(()));

    let agent = env.agent().hooks(NODE_EGRESS).spawn_ready();
    env.assert_nothing_arrives(|| assert!(!gets_any_answer(&env, &inner), "{}", agent.log()));
    assert!(reachable(&env.node, METADATA));
    drop(agent);
    env.unload();
    poll_until(LONG, "responses after unload", || reaches(&env, &inner).then_some(()));
}
