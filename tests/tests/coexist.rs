//! Programs of other software on the same hook, such as a CNI's, which may accept packets and thereby end their
//! processing at the hook.

use aya::programs::tc::TcAttachType;
use imds_tests::{
    AttachMode, METADATA, PacketSocket, Pod, PodLink, SERVICE, World,
    foreign::{Foreign, TC_ACT_OK},
    hook::{self, Attached, run_tc},
    packets,
    poll::poll_until,
    probe::{LONG, reachable},
    skip_without_tcx, with_each_backend,
};

/// TC action that leaves the packet to the next program.
const TC_ACT_UNSPEC: i32 = -1;

fn names(programs: &[Attached]) -> Vec<bool> {
    programs.iter().map(Attached::is_ours).collect()
}

#[track_caller]
fn assert_first(world: &World, pod: &Pod) {
    let status = world.status_when("from_pod is first", |status| {
        let is_first =
            status.find(&pod.host_ifname).is_some_and(|interface| interface.is_first() == Some(true));
        is_first && status.problems.is_empty()
    });
    assert_eq!(status.state, "enforcing");
    assert_eq!(names(&hook::programs(&world.node, &pod.host_ifname)), [true, false]);
    world.assert_blocked(pod);
    world.assert_harmless(pod);
}

#[test]
fn earlier_tcx_program_comes_second() {
    if skip_without_tcx() {
        return;
    }
    let world = World::new();
    let pod = world.add_pod(PodLink::Routed);
    let _link =
        Foreign::returning(TC_ACT_OK).attach_tcx_first(&world.node, pod.host_ifindex, TcAttachType::Ingress);
    world.assert_open(&pod);
    let _agent = world.start_agent(AttachMode::Tcx);
    assert_first(&world, &pod);
}

#[test]
fn later_tcx_program_does_not_stay_first() {
    if skip_without_tcx() {
        return;
    }
    let world = World::new();
    let pod = world.add_pod(PodLink::Routed);
    let agent = world.agent().backend(AttachMode::Tcx).resync(1).spawn_ready();
    let _link =
        Foreign::returning(TC_ACT_OK).attach_tcx_first(&world.node, pod.host_ifindex, TcAttachType::Ingress);
    assert_first(&world, &pod);

    agent.kill9();
    let _another =
        Foreign::returning(TC_ACT_OK).attach_tcx_first(&world.node, pod.host_ifindex, TcAttachType::Ingress);
    assert_eq!(world.status().interface(&pod.host_ifname).is_first(), Some(false));
    let _agent = world.start_agent(AttachMode::Tcx);
    poll_until(LONG, "from_pod to be first", || {
        let programs = names(&hook::programs(&world.node, &pod.host_ifname));
        (programs == [true, false, false]).then_some(())
    });
    world.assert_blocked(&pod);
}

#[test]
fn earlier_bpf_filter_comes_second() {
    let world = World::new();
    let pod = world.add_pod(PodLink::Bridged);
    run_tc(&world.node, &["qdisc", "add", "dev", &pod.host_ifname, "clsact"]);
    Foreign::returning(TC_ACT_OK).attach_filter(&world.node, &pod.host_ifname, TcAttachType::Ingress, 1);
    world.assert_open(&pod);
    let _agent = world.start_agent(AttachMode::Clsact);
    assert_first(&world, &pod);
}

#[test]
fn later_bpf_filter_does_not_stay_first() {
    let world = World::new();
    let pod = world.add_pod(PodLink::Bridged);
    let _agent = world.agent().backend(AttachMode::Clsact).resync(1).spawn_ready();
    Foreign::returning(TC_ACT_OK).attach_filter(&world.node, &pod.host_ifname, TcAttachType::Ingress, 1);
    assert_first(&world, &pod);
}

/// Adds a filter that classifies every packet at the first priority, which ends processing at the clsact hook. A filter
/// of another kind cannot share that priority.
fn add_u32_filter(world: &World, pod: &Pod) {
    let filter = ["filter", "add", "dev", &pod.host_ifname, "ingress", "prio", "1", "protocol", "all"];
    run_tc(&world.node, &["qdisc", "add", "dev", &pod.host_ifname, "clsact"]);
    run_tc(&world.node, &[&filter[..], &["u32", "match", "u32", "0", "0", "classid", "1:1"]].concat());
}

#[test]
fn blocking_filter_is_reported_in_status() {
    let world = World::new();
    let pod = world.add_pod(PodLink::Routed);
    add_u32_filter(&world, &pod);
    let _agent = world.agent().backend(AttachMode::Clsact).spawn();

    let status = world.wait_guarded(&pod);
    let interface = status.interface(&pod.host_ifname);
    assert_eq!((interface.attach_mode(), interface.is_first()), (Some("clsact"), Some(false)));
    assert!(status.problems.iter().any(|problem| problem.interface.as_ref() == Some(&pod.host_ifname)));
    assert_eq!(status.state, "degraded");
    assert_eq!(world.imds_agent(&["status"]).output().status.code(), Some(3));
    // The consequence while the other filter accepts every packet: nothing is denied.
    world.assert_open(&pod);

    run_tc(&world.node, &["filter", "delete", "dev", &pod.host_ifname, "ingress", "prio", "1"]);
    world.assert_blocked(&pod);
}

#[test]
fn tcx_runs_before_filters() {
    if skip_without_tcx() {
        return;
    }
    let world = World::new();
    let pod = world.add_pod(PodLink::Routed);
    add_u32_filter(&world, &pod);
    let agent = world.start_agent(AttachMode::Tcx);
    assert_eq!(world.status().interface(&pod.host_ifname).is_first(), Some(true));
    world.assert_blocked(&pod);
    assert!(reachable(&pod.netns, SERVICE));

    drop(agent);
    world.unload();
    // The agent leaves the qdisc and the filter of other software in place.
    assert!(hook::has_clsact(&world.node, &pod.host_ifname));
    world.assert_open(&pod);
}

#[test]
fn foreign_dropper_still_sees_traffic() {
    const TC_ACT_SHOT: i32 = 2;
    if skip_without_tcx() {
        return;
    }
    let world = World::new();
    let pod = world.add_pod(PodLink::Routed);
    assert!(reachable(&pod.netns, SERVICE));
    let link = Foreign::returning(TC_ACT_SHOT).attach_tcx_first(
        &world.node,
        pod.host_ifindex,
        TcAttachType::Ingress,
    );
    let _agent = world.start_agent(AttachMode::Tcx);
    // The agent's program, which is now first, leaves allowed packets to the other programs.
    assert!(!imds_tests::probe::udp_echo(&pod.netns, SERVICE, imds_tests::probe::SHORT).is_answer());
    drop(link);
    world.assert_harmless(&pod);
}

/// A foreign attachment at a hook, which is removed on drop.
enum Attachment {
    Tcx(#[expect(dead_code, reason = "detached when dropped")] std::os::fd::OwnedFd),
    Filter,
}

fn attach_first(
    world: &World,
    backend: AttachMode,
    program: &Foreign,
    interface: &str,
    at: TcAttachType,
) -> Attachment {
    match backend {
        AttachMode::Tcx => {
            let index = world.node.run(|| nix::net::if_::if_nametoindex(interface)).unwrap();
            Attachment::Tcx(program.attach_tcx_first(&world.node, index, at))
        }
        AttachMode::Clsact => {
            if !hook::has_clsact(&world.node, interface) {
                run_tc(&world.node, &["qdisc", "add", "dev", interface, "clsact"]);
            }
            program.attach_filter(&world.node, interface, at, 1);
            Attachment::Filter
        }
    }
}

fn wait_until_first(world: &World, interface: &str, at: TcAttachType) {
    poll_until(LONG, "from_pod to be first", || {
        let programs = names(&hook::programs_at(&world.node, interface, at));
        (programs == [true, false]).then_some(())
    });
}

/// Reports whether a packet of the pod arrives at the metadata service, whatever the destination of its frame.
fn arrives(world: &World, pod: &Pod) -> bool {
    let packet = packets::udp(pod.address, METADATA, b"redirected");
    world.arrives(|| {
        PacketSocket::frames(&pod.netns, Pod::IFNAME).send(&packets::frame(pod, &packet)).unwrap();
    })
}

/// Asserts that a foreign program that accepts, skips or redirects every packet does not open one of the agent's hooks,
/// whether it is attached before the agent or later.
fn assert_foreign_is_no_way(hook: &'static str, at: TcAttachType, kinds: &[&str]) {
    with_each_backend(|backend| {
        for is_later in [false, true] {
            for &kind in kinds {
                let world = World::new();
                let pod = world.add_pod(PodLink::Routed);
                let uplink = world.node.run(|| nix::net::if_::if_nametoindex(World::UPLINK)).unwrap();
                let interface = if hook == "from_pod" { &*pod.host_ifname } else { World::UPLINK };
                let program = match kind {
                    "accepts" => Foreign::returning(TC_ACT_OK),
                    "leaves" => Foreign::returning(TC_ACT_UNSPEC),
                    _ => Foreign::redirecting(uplink),
                };
                let attach = || attach_first(&world, backend, &program, interface, at);
                let start = || world.agent().backend(backend).hooks(&[hook]).resync(1).spawn_ready();
                let (_attached, agent) = if is_later {
                    assert!(arrives(&world, &pod));
                    let agent = start();
                    (attach(), agent)
                } else {
                    let attached = attach();
                    assert!(arrives(&world, &pod), "{kind}");
                    (attached, start())
                };
                wait_until_first(&world, interface, at);
                assert!(!arrives(&world, &pod), "{hook}: {kind}, later: {is_later}");
                world.status_when("the agent is ready", |status| {
                    status.is_ready() && status.state == "enforcing"
                });
                drop(agent);
                world.unload();
                assert!(arrives(&world, &pod), "{kind}");
            }
        }
    });
}

#[test]
fn foreign_programs_second_at_from_pod() {
    assert_foreign_is_no_way("from_pod", TcAttachType::Ingress, &["accepts", "leaves", "redirects"]);
}

#[test]
fn foreign_programs_second_at_node_egress() {
    assert_foreign_is_no_way("node_egress", TcAttachType::Egress, &["accepts", "leaves"]);
}

/// `node_egress` denies packets that another program, first at the pod's interface, redirects.
#[test]
fn redirect_past_from_pod_meets_node_egress() {
    with_each_backend(|backend| {
        let world = World::new();
        let pod = world.add_pod(PodLink::Routed);
        let uplink = world.node.run(|| nix::net::if_::if_nametoindex(World::UPLINK)).unwrap();
        let program = Foreign::redirecting(uplink);
        let attached = attach_first(&world, backend, &program, &pod.host_ifname, TcAttachType::Ingress);
        assert!(arrives(&world, &pod));
        let agent = world.agent().backend(backend).hooks(&["node_egress"]).spawn_ready();
        assert!(!arrives(&world, &pod));
        assert!(world.status().interface(World::UPLINK).counts.denied.packets > 0);
        drop(agent);
        world.unload();
        assert!(arrives(&world, &pod));
        drop(attached);
    });
}
