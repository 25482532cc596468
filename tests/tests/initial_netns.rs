//! The machine's initial network namespace as the node's, as outside of tests. Before Linux 5.14 the hooks `socket` and
//! `host_network` work only there.

use imds_tests::{
    METADATA, PodLink, SERVICE, TestEnv,
    probe::{LONG, SHORT, http_get},
    skip_unless_disposable,
};

#[test]
fn every_hook_spares_the_initial_netns() {
    if skip_unless_disposable("uses the machine's own network namespace as the node's") {
        return;
    }
    let env = TestEnv::of_machine();
    let pod = env.add_pod(PodLink::Routed);
    let host_pod = env.add_cgroup("kubepods.slice/pod7.slice/container");
    let by_socket = || env.in_cgroup(|| http_get(&pod.netns, METADATA, SHORT).is_answer());
    let of_node = || env.in_cgroup(|| http_get(&env.node, METADATA, SHORT).is_answer());
    let of_host_pod = || host_pod.run(|| http_get(&env.node, METADATA, SHORT).is_answer());
    let reach = || [by_socket(), of_node(), of_host_pod()];
    assert_eq!(reach(), [true; 3]);
    for (hooks, expected) in [
        (&["socket"][..], [false, true, true]),
        (&["host_network"], [true, true, false]),
        (&["from_pod", "node_egress", "socket", "host_network"], [false, true, false]),
    ] {
        let agent = env.agent().hooks(hooks).spawn_ready();
        assert_eq!(reach(), expected, "{hooks:?}: {}", agent.log());
        env.assert_nothing_arrives(|| assert!(expected[0] || !by_socket(), "{hooks:?}"));
        assert!(env.in_cgroup(|| http_get(&pod.netns, SERVICE, LONG)).is_answer(), "{hooks:?}");
        drop(agent);
        env.unload();
        assert_eq!(reach(), [true; 3], "after {hooks:?}");
    }
}
