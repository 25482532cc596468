//! What was detached or removed behind the agent's back is restored, and said so.

use std::{fs, path::PathBuf};

use imds_tests::{
    Agent, Backend, Pod, PodLink, World,
    foreign::detach_link,
    hook::{self, run_tc},
    poll::poll_until,
    probe::LONG,
    skip_without_tcx, with_each_backend,
};

const LINKS: [PodLink; 2] = [PodLink::Routed, PodLink::Bridged];

fn start(world: &World, backend: Backend) -> Agent<'_> {
    world.agent().backend(backend).resync(1).spawn_ready()
}

fn link_pin(world: &World, pod: &Pod) -> PathBuf {
    world.pin_dir().join(format!("links/pod_edge_{}", pod.host_ifindex))
}

/// Takes the agent's program away, with no trace in the pin directory.
fn detach(world: &World, backend: Backend, pod: &Pod) {
    match backend {
        Backend::Tcx => detach_link(&link_pin(world, pod)),
        Backend::Clsact => run_tc(&world.node, &["qdisc", "delete", "dev", &pod.host_ifname, "clsact"]),
    }
}

/// Waits until the agent's program is the hook's first again, and until the agent has told its log.
fn assert_restored(world: &World, agent: &Agent<'_>, pod: &Pod, lines_before: usize) {
    poll_until(LONG, "the program to be attached again", || {
        hook::programs(&world.node, &pod.host_ifname)
            .first()
            .is_some_and(hook::Attached::is_ours)
            .then_some(())
    });
    world.assert_blocked(pod);
    poll_until(LONG, "a line in the log that names the interface", || {
        agent.log().lines().skip(lines_before).any(|line| line.contains(&pod.host_ifname)).then_some(())
    });
    world.status_when("all is well", |status| status.is_ready() && status.state == "enforcing");
}

#[test]
fn a_detached_tcx_link_is_attached_again() {
    if skip_without_tcx() {
        return;
    }
    let world = World::new();
    let pods = LINKS.map(|link| world.add_pod(link));
    let agent = start(&world, Backend::Tcx);
    for pod in &pods {
        let lines = agent.log().lines().count();
        detach(&world, Backend::Tcx, pod);
        assert_restored(&world, &agent, pod, lines);
        assert_eq!(hook::tcx(&world.node, &pod.host_ifname).len(), 1);
    }
}

#[test]
fn a_removed_clsact_qdisc_is_made_again() {
    let world = World::new();
    let pods = LINKS.map(|link| world.add_pod(link));
    let agent = start(&world, Backend::Clsact);
    for pod in &pods {
        let lines = agent.log().lines().count();
        detach(&world, Backend::Clsact, pod);
        assert_restored(&world, &agent, pod, lines);
        assert_eq!(hook::filters(&world.node, &pod.host_ifname).len(), 1);
    }
    // That it was made anew changes nothing of whose it is.
    drop(agent);
    world.unload();
    assert!(pods.iter().all(|pod| !hook::has_clsact(&world.node, &pod.host_ifname)));
}

#[test]
fn a_removed_filter_is_added_again() {
    let world = World::new();
    let pod = world.add_pod(PodLink::Routed);
    let agent = start(&world, Backend::Clsact);
    let lines = agent.log().lines().count();
    run_tc(&world.node, &["filter", "delete", "dev", &pod.host_ifname, "ingress"]);
    assert_restored(&world, &agent, &pod, lines);
}

#[test]
fn a_removed_link_pin_is_pinned_again_without_a_gap() {
    if skip_without_tcx() {
        return;
    }
    let world = World::new();
    let pod = world.add_pod(PodLink::Bridged);
    let _agent = start(&world, Backend::Tcx);
    let pin = link_pin(&world, &pod);
    let before = hook::tcx(&world.node, &pod.host_ifname);

    fs::remove_file(&pin).unwrap();
    world.assert_blocked(&pod);
    poll_until(LONG, "the link to be pinned again", || pin.exists().then_some(()));
    assert_eq!(hook::tcx(&world.node, &pod.host_ifname), before);
    world.status_when("all is well", |status| status.is_ready() && status.state == "enforcing");
}

#[test]
fn a_removed_pin_directory_is_made_again_without_a_gap() {
    with_each_backend(|backend| {
        let world = World::new();
        let pod = world.add_pod(PodLink::Routed);
        let _agent = start(&world, backend);
        world.assert_blocked(&pod);
        let denied = world.status().total.denied.packets;

        fs::remove_dir_all(world.pin_dir()).unwrap();
        world.assert_blocked(&pod);
        let status =
            world.status_when("all is well", |status| status.is_ready() && status.state == "enforcing");
        assert!(status.total.denied.packets > denied);
        for pin in ["maps/imds_policy", "maps/imds_counters", "maps/imds_interfaces", "progs/imds_pod_edge"] {
            assert!(world.pin_dir().join(pin).exists(), "{pin}");
        }
    });
}

#[test]
fn what_was_detached_while_no_agent_ran_shows_in_the_status_and_is_restored_by_the_next() {
    with_each_backend(|backend| {
        let world = World::new();
        let pod = world.add_pod(PodLink::Routed);
        start(&world, backend).kill9();
        detach(&world, backend, &pod);
        world.assert_open(&pod);

        let status = world.status();
        assert_eq!((status.state.as_str(), &status.interface(&pod.host_ifname).guard), ("degraded", &None));
        assert!(status.problems.iter().any(|problem| problem.interface.as_ref() == Some(&pod.host_ifname)));
        assert_eq!(world.imds_agent(&["status"]).output().status.code(), Some(3));

        let agent = start(&world, backend);
        assert_restored(&world, &agent, &pod, 0);
    });
}
