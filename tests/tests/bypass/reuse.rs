//! Interface names and indices that are reused, and interfaces that change theirs.

use imds_tests::{
    METADATA, Netns, Pod, PodLink, World,
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
        let world = World::new();
        let pod = world.add_pod(PodLink::Bridged);
        assert!(reachable(&pod.netns, METADATA));
        let agent = world.agent().hooks(&[hook]).spawn_ready();
        world.in_cgroup(|| assert!(!http_get(&pod.netns, METADATA, SHORT).is_answer(), "{hook}"));
        rename_and_move(&world, &pod);
        world.in_cgroup(|| assert!(!http_get(&pod.netns, METADATA, SHORT).is_answer(), "{hook}"));
        if hook == "from_pod" {
            world.status_when("the status has the new name", |status| {
                status.find("other0").is_some_and(|link| link.role == "pod" && link.is_attached())
            });
        }
        world.in_cgroup(|| assert!(!http_get(&pod.netns, METADATA, SHORT).is_answer(), "{hook}"));
        drop(agent);
        world.unload();
        assert!(reachable(&pod.netns, METADATA), "{hook}");
    }
}

fn rename_and_move(world: &World, pod: &Pod) {
    world.node.ip(&format!(
        "link set {0} down
         link set {0} name other0
         link add cni1 type bridge
         link set cni1 up
         link set other0 master cni1
         link set other0 up
         addr del {1}/18 dev {2}
         addr add {1}/18 dev cni1",
        pod.host_ifname,
        bridge_address(world),
        World::BRIDGE
    ));
    // The new bridge has the address of the replaced one, but another MAC address.
    pod.netns.ip("neigh flush all");
}

fn bridge_address(world: &World) -> String {
    let mut command = world.node.command("ip");
    command.args(["-4", "-o", "addr", "show", "dev", World::BRIDGE]);
    let output = String::from_utf8(output(command).stdout).unwrap();
    let address = output.split_whitespace().find_map(|word| word.split_once('/')).expect("an address");
    address.0.to_owned()
}

#[test]
fn reused_name_and_index_start_from_zero() {
    let world = World::new();
    let first = world.add_pod(PodLink::Routed);
    let agent = world.agent().spawn_ready();
    world.assert_blocked(&first);
    let denied = world.status().interface(&first.host_ifname).counts.denied.packets;
    assert!(denied > 0);

    // The agent is killed first: the next one can only detect the change by the interfaces themselves.
    agent.kill9();
    let (name, index) = (first.host_ifname.clone(), first.host_ifindex);
    first.delete();
    let successor = Netns::new("successor");
    world.node.ip(&format!(
        "link add {name} index {index} type veth peer name {} netns {}",
        Pod::IFNAME,
        successor.name()
    ));
    world.node.ip(&format!("link set {name} up"));
    let agent = world.agent().spawn_ready();
    let status = world.status();
    let interface = status.interface(&name);
    assert!(interface.ifindex == index && interface.is_attached(), "{interface:?}");
    assert_eq!(interface.counts.denied.packets, 0);
    assert_eq!(status.departed.denied.packets, denied);
    drop(agent);
}

/// A pod starts while no agent runs and replaces a deleted pod in every respect but its namespace.
#[test]
fn successor_is_denied_from_first_packet() {
    for hook in known_here(&["node_egress", "socket"]) {
        let world = World::new();
        let first = world.add_pod(PodLink::Routed);
        let agent = world.agent().hooks(&[hook]).spawn_ready();
        world.in_cgroup(|| assert!(!http_get(&first.netns, METADATA, SHORT).is_answer(), "{hook}"));
        agent.kill9();
        let (name, index, address) = (first.host_ifname.clone(), first.host_ifindex, first.address);
        first.delete();
        let successor = world.add_successor(&name, index, address);
        world.assert_nothing_arrives(|| {
            world.in_cgroup(|| assert!(!http_get(&successor, METADATA, SHORT).is_answer(), "{hook}"));
        });
        world.unload();
        assert!(reachable(&successor, METADATA), "{hook}");
    }
}

fn is_ours_at_egress(world: &World, interface: &str) -> bool {
    hook::programs_at(&world.node, interface, TcAttachType::Egress).first().is_some_and(Attached::is_ours)
}

/// `node_egress` is detached with the interface, and attached again to an interface of the same name and index.
#[test]
fn renamed_or_recreated_uplink_is_enforced() {
    let world = World::new();
    let pod = world.add_pod(PodLink::Routed);
    world.assert_open(&pod);
    let agent = world.agent().hooks(&["node_egress"]).resync(1).spawn_ready();
    world.assert_blocked(&pod);

    let up = |name: &str| {
        world.node.ip(&format!("link set {name} up\nroute replace default via 10.0.0.1 dev {name}"));
    };
    world.node.ip(&format!("link set {} down\nlink set {} name wan0", World::UPLINK, World::UPLINK));
    up("wan0");
    assert!(is_ours_at_egress(&world, "wan0"));
    world.assert_blocked(&pod);
    world.node.ip(&format!("link set wan0 down\nlink set wan0 name {}", World::UPLINK));
    up(World::UPLINK);
    world.assert_blocked(&pod);

    let index = world.node.run(|| nix::net::if_::if_nametoindex(World::UPLINK)).unwrap();
    world.node.ip(&format!(
        "link delete {0}
         link add {0} index {index} type veth peer name node1 netns {1}
         addr add 10.0.0.4/24 dev {0}",
        World::UPLINK,
        world.fabric.name()
    ));
    poll_until(LONG, "the new uplink to be enforced", || {
        is_ours_at_egress(&world, World::UPLINK).then_some(())
    });
    world.fabric.ip("addr add 10.0.0.1/24 dev node1
         link set node1 up");
    up(World::UPLINK);
    world.fabric.ip("route add 10.244.0.0/16 via 10.0.0.4");
    assert!(!http_get(&pod.netns, METADATA, SHORT).is_answer());
    assert!(reachable(&world.node, METADATA));
    drop(agent);
    world.unload();
    assert!(reachable(&pod.netns, METADATA));
}
