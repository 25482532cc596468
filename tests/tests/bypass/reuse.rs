//! Interface names and indices that are reused, and interfaces that change theirs.

use imds_tests::{
    METADATA, Pod, PodLink, TestEnv,
    hook::{self, Attached},
    known_here, output,
    poll::poll_until,
    probe::{LONG, SHORT, http_get, reachable},
};

use aya::programs::tc::TcAttachType;

use crate::ALL;

#[test]
fn renamed_or_moved_link_stays_denied() {
    for hook in known_here(&ALL) {
        let env = TestEnv::new();
        let pod = env.add_pod(PodLink::Bridged);
        assert!(reachable(&pod.netns, METADATA));
        let agent = env.agent().hooks(&[hook]).spawn_ready();
        env.in_cgroup(|| assert!(!http_get(&pod.netns, METADATA, SHORT).is_answer(), "{hook}"));
        rename_and_move(&env, &pod);
        env.in_cgroup(|| assert!(!http_get(&pod.netns, METADATA, SHORT).is_answer(), "{hook}"));
        if hook == "from_pod" {
            env.status_when("the status has the new name", |status| {
                status.find("other0").is_some_and(|link| link.role == "pod" && link.is_attached())
            });
        }
        env.in_cgroup(|| assert!(!http_get(&pod.netns, METADATA, SHORT).is_answer(), "{hook}"));
        drop(agent);
        env.unload();
        assert!(reachable(&pod.netns, METADATA), "{hook}");
    }
}

fn rename_and_move(env: &TestEnv, pod: &Pod) {
    env.node.ip(&format!(
        "link set {0} down
         link set {0} name other0
         link add cni1 type bridge
         link set cni1 up
         link set other0 master cni1
         link set other0 up
         addr del {1}/18 dev {2}
         addr add {1}/18 dev cni1",
        pod.host_ifname,
        bridge_address(env),
        TestEnv::BRIDGE
    ));
    // The new bridge has the address of the replaced one, but another MAC address.
    pod.netns.ip("neigh flush all");
}

fn bridge_address(env: &TestEnv) -> String {
    let mut command = env.node.command("ip");
    command.args(["-4", "-o", "addr", "show", "dev", TestEnv::BRIDGE]);
    let output = String::from_utf8(output(command).stdout).unwrap();
    let address = output.split_whitespace().find_map(|word| word.split_once('/')).expect("an address");
    address.0.to_owned()
}

#[test]
fn reused_name_and_index_start_from_zero() {
    let env = TestEnv::new();
    let first = env.add_pod(PodLink::Routed);
    let agent = env.agent().spawn_ready();
    env.assert_blocked(&first);
    let denied = env.status().interface(&first.host_ifname).counts.denied.packets;
    assert!(denied > 0);

    // The agent is killed first: the next one can only detect the change by the interfaces themselves.
    agent.kill9();
    let (name, index, address) = (first.host_ifname.clone(), first.host_ifindex, first.address);
    first.delete();
    let _successor = env.add_successor(&name, index, address);
    let agent = env.agent().spawn_ready();
    let status = env.status();
    let interface = status.interface(&name);
    assert!(interface.ifindex == index && interface.is_attached(), "{interface:?}");
    assert_eq!(interface.counts.denied.packets, 0);
    assert_eq!(status.deleted.denied.packets, denied);
    drop(agent);
}

/// A pod starts while no agent runs and replaces a deleted pod in every respect but its namespace.
#[test]
fn successor_is_denied_from_first_packet() {
    for hook in known_here(&["node_egress", "socket"]) {
        let env = TestEnv::new();
        let first = env.add_pod(PodLink::Routed);
        let agent = env.agent().hooks(&[hook]).spawn_ready();
        env.in_cgroup(|| assert!(!http_get(&first.netns, METADATA, SHORT).is_answer(), "{hook}"));
        agent.kill9();
        let (name, index, address) = (first.host_ifname.clone(), first.host_ifindex, first.address);
        first.delete();
        let successor = env.add_successor(&name, index, address);
        env.assert_nothing_arrives(|| {
            env.in_cgroup(|| assert!(!http_get(&successor, METADATA, SHORT).is_answer(), "{hook}"));
        });
        env.unload();
        assert!(reachable(&successor, METADATA), "{hook}");
    }
}

fn is_ours_at_egress(env: &TestEnv, interface: &str) -> bool {
    hook::programs_at(&env.node, interface, TcAttachType::Egress).first().is_some_and(Attached::is_ours)
}

/// `node_egress` is detached with the interface, and attached again to an interface of the same name and index.
#[test]
fn renamed_or_recreated_uplink_is_enforced() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    env.assert_open(&pod);
    let agent = env.agent().hooks(&["node_egress"]).resync(1).spawn_ready();
    env.assert_blocked(&pod);

    let up = |name: &str| {
        env.node.ip(&format!("link set {name} up\nroute replace default via 10.0.0.1 dev {name}"));
    };
    env.node.ip(&format!("link set {} down\nlink set {} name wan0", TestEnv::UPLINK, TestEnv::UPLINK));
    up("wan0");
    assert!(is_ours_at_egress(&env, "wan0"));
    env.assert_blocked(&pod);
    env.node.ip(&format!("link set wan0 down\nlink set wan0 name {}", TestEnv::UPLINK));
    up(TestEnv::UPLINK);
    env.assert_blocked(&pod);

    let index = env.node.run(|| nix::net::if_::if_nametoindex(TestEnv::UPLINK)).unwrap();
    env.node.ip(&format!(
        "link delete {0}
         link add {0} index {index} type veth peer name node1 netns {1}
         addr add 10.0.0.4/24 dev {0}",
        TestEnv::UPLINK,
        env.fabric.name()
    ));
    poll_until(LONG, "the new uplink to be enforced", || {
        is_ours_at_egress(&env, TestEnv::UPLINK).then_some(())
    });
    env.fabric.ip("addr add 10.0.0.1/24 dev node1
         link set node1 up");
    up(TestEnv::UPLINK);
    env.fabric.ip("route add 10.244.0.0/16 via 10.0.0.4");
    assert!(!http_get(&pod.netns, METADATA, SHORT).is_answer());
    assert!(reachable(&env.node, METADATA));
    drop(agent);
    env.unload();
    assert!(reachable(&pod.netns, METADATA));
}
