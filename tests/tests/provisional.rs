//! Filters that hold pods until there is time for TCX, where the agent chooses how to attach.

use aya::programs::tc::TcAttachType;
use imds_tests::{
    AttachMode, METADATA, Pod, PodLink, SERVICE, World,
    flood::Flood,
    foreign::{Foreign, TC_ACT_OK},
    hook::{has_clsact, tcx},
    probe::reachable,
    skip_without_tcx,
};

/// How the pod is held, as the status has it.
fn guard(world: &World, pod: &Pod) -> Option<String> {
    world.status().find(&pod.host_ifname).and_then(|interface| interface.guard.clone())
}

fn wait_for_tcx(world: &World, pod: &Pod) {
    world.status_when("TCX in the place of the filter", |status| {
        status.find(&pod.host_ifname).is_some_and(|interface| interface.guard.as_deref() == Some("tcx"))
    });
}

#[test]
fn a_pod_is_held_by_a_filter_and_then_by_tcx_with_nothing_between() {
    if skip_without_tcx() {
        return;
    }
    let world = World::new();
    let pods = [PodLink::Routed, PodLink::Bridged].map(|link| world.add_pod(link));
    for pod in &pods {
        world.assert_open(pod);
    }
    let agent = world.agent().spawn_ready();
    world.assert_nothing_arrives(|| {
        let floods = pods.each_ref().map(|pod| Flood::udp(pod, METADATA));
        for pod in &pods {
            wait_for_tcx(&world, pod);
        }
        // What the filter took is gone with it.
        for pod in &pods {
            assert!(!has_clsact(&world.node, &pod.host_ifname), "{}", agent.log());
        }
        assert!(floods.into_iter().all(|flood| flood.stop() > 0));
    });
    assert!(!agent.log().contains("WARN"), "{}", agent.log());
    let late = world.add_pod(PodLink::Routed);
    world.wait_guarded(&late);
    world.assert_blocked(&late);
    wait_for_tcx(&world, &late);
    world.assert_blocked(&late);
    drop(agent);
    world.unload();
    for pod in pods.iter().chain([&late]) {
        world.assert_open(pod);
    }
}

#[test]
fn an_agent_that_is_killed_between_the_two_leaves_the_pod_held_and_the_next_goes_on() {
    if skip_without_tcx() {
        return;
    }
    let world = World::new();
    let pod = world.add_pod(PodLink::Routed);
    world.assert_open(&pod);
    // What it leaves when it has come no further.
    world.agent().backend(AttachMode::Clsact).spawn_ready().kill9();
    world.assert_nothing_arrives(|| {
        let flood = Flood::udp(&pod, METADATA);
        assert_eq!(guard(&world, &pod).as_deref(), Some("clsact"));
        let agent = world.agent().spawn_ready();
        wait_for_tcx(&world, &pod);
        drop(agent);
        assert!(flood.stop() > 0);
    });
    world.unload();
    world.assert_open(&pod);
}

#[test]
fn an_exempt_pod_stays_exempt_when_it_gets_tcx() {
    if skip_without_tcx() {
        return;
    }
    let world = World::new();
    let pod = world.add_pod(PodLink::Routed);
    world.assert_open(&pod);
    let rule = format!("[[exempt]]\nname = 'it'\ninterface = '{}'", pod.host_ifname);
    let agent = world.agent().config(&rule).spawn_ready();
    assert!(reachable(&pod.netns, METADATA), "{}", agent.log());
    wait_for_tcx(&world, &pod);
    let denied = world.status().denied();
    assert!(reachable(&pod.netns, METADATA));
    assert_eq!(denied, 0, "{}", agent.log());
    drop(agent);
    world.unload();
    world.assert_open(&pod);
}

#[test]
fn a_pod_where_another_tcx_program_lets_all_pass_has_tcx_at_once() {
    if skip_without_tcx() {
        return;
    }
    let world = World::new();
    let pod = world.add_pod(PodLink::Routed);
    let other = Foreign::returning(TC_ACT_OK);
    let _link = other.attach_tcx_first(&world.node, pod.host_ifindex, TcAttachType::Ingress);
    world.assert_open(&pod);
    let agent = world.agent().spawn_ready();
    // A filter would come after it, and see nothing.
    assert_eq!(guard(&world, &pod).as_deref(), Some("tcx"));
    assert!(tcx(&world.node, &pod.host_ifname)[0].is_ours());
    world.assert_blocked(&pod);
    assert!(reachable(&pod.netns, SERVICE));
    drop(agent);
    world.unload();
    world.assert_open(&pod);
}

#[test]
fn a_pod_is_held_though_another_tcx_program_comes_before_its_filter() {
    if skip_without_tcx() {
        return;
    }
    let world = World::new();
    let pod = world.add_pod(PodLink::Routed);
    world.assert_open(&pod);
    world.agent().backend(AttachMode::Clsact).spawn_ready().kill9();
    world.assert_blocked(&pod);
    let other = Foreign::returning(TC_ACT_OK);
    let _link = other.attach_tcx_first(&world.node, pod.host_ifindex, TcAttachType::Ingress);
    world.assert_open(&pod);
    let agent = world.agent().spawn_ready();
    world.assert_blocked(&pod);
    assert!(tcx(&world.node, &pod.host_ifname)[0].is_ours());
    drop(agent);
    world.unload();
    world.assert_open(&pod);
}
