//! The machine's initial network namespace as the node's, as outside of tests. Before Linux 5.14 the hooks `socket` and
//! `host_network` work only there.

use imds_tests::{
    METADATA, PodLink, SERVICE, World,
    probe::{LONG, SHORT, http_get},
    skip_unless_disposable,
};

#[test]
fn every_hook_spares_the_initial_netns() {
    if skip_unless_disposable("uses the machine's own network namespace as the node's") {
        return;
    }
    let world = World::of_machine();
    let pod = world.add_pod(PodLink::Routed);
    let host_pod = world.add_cgroup("kubepods.slice/pod7.slice/container");
    let by_socket = || world.in_cgroup(|| http_get(&pod.netns, METADATA, SHORT).is_answer());
    let of_node = || world.in_cgroup(|| http_get(&world.node, METADATA, SHORT).is_answer());
    let of_host_pod = || host_pod.run(|| http_get(&world.node, METADATA, SHORT).is_answer());
    let reach = || [by_socket(), of_node(), of_host_pod()];
    assert_eq!(reach(), [true; 3]);
    for (hooks, expected) in [
        (&["socket"][..], [false, true, true]),
        (&["host_network"], [true, true, false]),
        (&["from_pod", "node_egress", "socket", "host_network"], [false, true, false]),
    ] {
        let agent = world.agent().hooks(hooks).spawn_ready();
        assert_eq!(reach(), expected, "{hooks:?}: {}", agent.log());
        world.assert_nothing_arrives(|| assert!(expected[0] || !by_socket(), "{hooks:?}"));
        assert!(world.in_cgroup(|| http_get(&pod.netns, SERVICE, LONG)).is_answer(), "{hooks:?}");
        drop(agent);
        world.unload();
        assert_eq!(reach(), [true; 3], "after {hooks:?}");
    }
}
