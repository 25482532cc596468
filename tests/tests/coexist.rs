//! Programs of other software on the same hook, such as a CNI's, which may accept packets and thereby end their
//! processing at the hook.

use std::net::Ipv4Addr;

use aya::programs::tc::TcAttachType;
use imds_tests::{
    AttachMode, METADATA, PacketSocket, Pod, PodLink, SERVICE, TestEnv, WHOLE_TEST,
    foreign_bpf::{ForeignLink, ForeignProgram, TC_ACT_OK},
    hook::{self, Attached, run_tc},
    lacks_program, output, packets,
    poll::poll_until,
    probe::{LONG, SHORT, http_get, reachable},
    skip_without_tcx, with_each_backend,
};

/// TC action that leaves the packet to the next program.
const TC_ACT_UNSPEC: i32 = -1;

fn names(programs: &[Attached]) -> Vec<bool> {
    programs.iter().map(Attached::is_ours).collect()
}

#[track_caller]
fn assert_first(env: &TestEnv, pod: &Pod) {
    let status = env.status_when("from_pod is first", |status| {
        let is_first =
            status.find(&pod.host_ifname).is_some_and(|interface| interface.is_first() == Some(true));
        is_first && status.problems.is_empty()
    });
    assert_eq!(status.state, "enforcing");
    assert_eq!(names(&hook::programs(&env.node, &pod.host_ifname)), [true, false]);
    env.assert_blocked(pod);
    env.assert_harmless(pod);
}

#[test]
fn earlier_tcx_program_comes_second() {
    if skip_without_tcx() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let _link = ForeignProgram::returning(TC_ACT_OK).attach_tcx_first(
        &env.node,
        pod.host_ifindex,
        TcAttachType::Ingress,
    );
    env.assert_open(&pod);
    let _agent = env.start_agent(AttachMode::Tcx);
    assert_first(&env, &pod);
}

#[test]
fn later_tcx_program_does_not_stay_first() {
    if skip_without_tcx() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let agent = env.agent().backend(AttachMode::Tcx).resync(1).spawn_ready();
    let _link = ForeignProgram::returning(TC_ACT_OK).attach_tcx_first(
        &env.node,
        pod.host_ifindex,
        TcAttachType::Ingress,
    );
    assert_first(&env, &pod);

    agent.kill9();
    let _another = ForeignProgram::returning(TC_ACT_OK).attach_tcx_first(
        &env.node,
        pod.host_ifindex,
        TcAttachType::Ingress,
    );
    assert_eq!(env.status().interface(&pod.host_ifname).is_first(), Some(false));
    let _agent = env.start_agent(AttachMode::Tcx);
    poll_until(LONG, "from_pod to be first", || {
        let programs = names(&hook::programs(&env.node, &pod.host_ifname));
        (programs == [true, false, false]).then_some(())
    });
    env.assert_blocked(&pod);
}

#[test]
fn earlier_bpf_filter_comes_second() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Bridged);
    run_tc(&env.node, &["qdisc", "add", "dev", &pod.host_ifname, "clsact"]);
    ForeignProgram::returning(TC_ACT_OK).attach_filter(&env.node, &pod.host_ifname, TcAttachType::Ingress, 1);
    env.assert_open(&pod);
    let _agent = env.start_agent(AttachMode::Clsact);
    assert_first(&env, &pod);
}

#[test]
fn later_bpf_filter_does_not_stay_first() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Bridged);
    let _agent = env.agent().backend(AttachMode::Clsact).resync(1).spawn_ready();
    ForeignProgram::returning(TC_ACT_OK).attach_filter(&env.node, &pod.host_ifname, TcAttachType::Ingress, 1);
    assert_first(&env, &pod);
}

/// Adds a filter that classifies every packet at the first priority, which ends processing at the clsact hook. A filter
/// of another kind cannot share that priority.
fn add_u32_filter(env: &TestEnv, pod: &Pod) {
    let filter = ["filter", "add", "dev", &pod.host_ifname, "ingress", "prio", "1", "protocol", "all"];
    run_tc(&env.node, &["qdisc", "add", "dev", &pod.host_ifname, "clsact"]);
    run_tc(&env.node, &[&filter[..], &["u32", "match", "u32", "0", "0", "classid", "1:1"]].concat());
}

#[test]
fn blocking_filter_is_reported_in_status() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    add_u32_filter(&env, &pod);
    let _agent = env.agent().backend(AttachMode::Clsact).spawn();

    let status = env.wait_enforced(&pod);
    let interface = status.interface(&pod.host_ifname);
    assert_eq!((interface.attach_mode(), interface.is_first()), (Some("clsact"), Some(false)));
    assert!(status.problems.iter().any(|problem| problem.interface.as_ref() == Some(&pod.host_ifname)));
    assert_eq!(status.state, "degraded");
    assert_eq!(env.imds_agent(&["status"]).output().status.code(), Some(3));
    // The consequence while the other filter accepts every packet: nothing is denied.
    env.assert_open(&pod);

    run_tc(&env.node, &["filter", "delete", "dev", &pod.host_ifname, "ingress", "prio", "1"]);
    env.assert_blocked(&pod);
}

#[test]
fn tcx_runs_before_filters() {
    if skip_without_tcx() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    add_u32_filter(&env, &pod);
    let agent = env.start_agent(AttachMode::Tcx);
    assert_eq!(env.status().interface(&pod.host_ifname).is_first(), Some(true));
    env.assert_blocked(&pod);
    assert!(reachable(&pod.netns, SERVICE));

    drop(agent);
    env.unload();
    // The agent leaves the qdisc and the filter of other software in place.
    assert!(hook::has_clsact(&env.node, &pod.host_ifname));
    env.assert_open(&pod);
}

#[test]
fn foreign_dropper_still_sees_traffic() {
    const TC_ACT_SHOT: i32 = 2;
    if skip_without_tcx() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    assert!(reachable(&pod.netns, SERVICE));
    let link = ForeignProgram::returning(TC_ACT_SHOT).attach_tcx_first(
        &env.node,
        pod.host_ifindex,
        TcAttachType::Ingress,
    );
    let _agent = env.start_agent(AttachMode::Tcx);
    // The agent's program, which is now first, leaves allowed packets to the other programs.
    assert!(!imds_tests::probe::udp_echo(&pod.netns, SERVICE, SHORT).is_answer());
    drop(link);
    env.assert_harmless(&pod);
}

/// A foreign attachment at a hook, which is removed on drop.
enum Attachment {
    Tcx(#[expect(dead_code, reason = "detached when dropped")] ForeignLink),
    Filter,
}

fn attach_first(
    env: &TestEnv,
    backend: AttachMode,
    program: &ForeignProgram,
    interface: &str,
    at: TcAttachType,
) -> Attachment {
    match backend {
        AttachMode::Tcx => {
            let index = env.node.run(|| nix::net::if_::if_nametoindex(interface)).unwrap();
            Attachment::Tcx(program.attach_tcx_first(&env.node, index, at))
        }
        AttachMode::Clsact => {
            if !hook::has_clsact(&env.node, interface) {
                run_tc(&env.node, &["qdisc", "add", "dev", interface, "clsact"]);
            }
            program.attach_filter(&env.node, interface, at, 1);
            Attachment::Filter
        }
    }
}

fn wait_until_first(env: &TestEnv, interface: &str, at: TcAttachType) {
    poll_until(LONG, "from_pod to be first", || {
        let programs = names(&hook::programs_at(&env.node, interface, at));
        (programs == [true, false]).then_some(())
    });
}

/// Reports whether a packet of the pod arrives at the metadata service, whatever the destination of its frame.
fn arrives(env: &TestEnv, pod: &Pod) -> bool {
    let packet = packets::udp(pod.address, METADATA, b"redirected");
    env.arrives(|| {
        PacketSocket::frames(&pod.netns, Pod::IFNAME).send(&packets::frame(pod, &packet)).unwrap();
    })
}

/// Asserts that a foreign program that accepts, skips or redirects every packet does not open one of the agent's hooks,
/// whether it is attached before the agent or later.
fn assert_foreign_is_no_way(hook: &'static str, at: TcAttachType, kinds: &[&str]) {
    with_each_backend(|backend| {
        for is_later in [false, true] {
            for &kind in kinds {
                let env = TestEnv::new();
                let pod = env.add_pod(PodLink::Routed);
                let uplink = env.node.run(|| nix::net::if_::if_nametoindex(TestEnv::UPLINK)).unwrap();
                let interface = if hook == "from_pod" { &*pod.host_ifname } else { TestEnv::UPLINK };
                let program = match kind {
                    "accepts" => ForeignProgram::returning(TC_ACT_OK),
                    "leaves" => ForeignProgram::returning(TC_ACT_UNSPEC),
                    _ => ForeignProgram::redirecting(uplink),
                };
                let attach = || attach_first(&env, backend, &program, interface, at);
                let start = || env.agent().backend(backend).hooks(&[hook]).resync(1).spawn_ready();
                let (_attached, agent) = if is_later {
                    assert!(arrives(&env, &pod));
                    let agent = start();
                    (attach(), agent)
                } else {
                    let attached = attach();
                    assert!(arrives(&env, &pod), "{kind}");
                    (attached, start())
                };
                wait_until_first(&env, interface, at);
                assert!(!arrives(&env, &pod), "{hook}: {kind}, later: {is_later}");
                env.status_when("the agent is ready", |status| {
                    status.is_ready() && status.state == "enforcing"
                });
                drop(agent);
                env.unload();
                assert!(arrives(&env, &pod), "{kind}");
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
        let env = TestEnv::new();
        let pod = env.add_pod(PodLink::Routed);
        let uplink = env.node.run(|| nix::net::if_::if_nametoindex(TestEnv::UPLINK)).unwrap();
        let program = ForeignProgram::redirecting(uplink);
        let attached = attach_first(&env, backend, &program, &pod.host_ifname, TcAttachType::Ingress);
        assert!(arrives(&env, &pod));
        let agent = env.agent().backend(backend).hooks(&["node_egress"]).spawn_ready();
        assert!(!arrives(&env, &pod));
        assert!(env.status().interface(TestEnv::UPLINK).counts.denied.packets > 0);
        drop(agent);
        env.unload();
        assert!(arrives(&env, &pod));
        drop(attached);
    });
}

/// Cilium's `set_identity_mark` and Calico's `skb_set_mark` assign all bits of the mark, after `from_pod`.
#[test]
fn programs_that_assign_the_mark() {
    const SERVICE_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 80);
    if lacks_program(WHOLE_TEST, &["nft"]) {
        return;
    }
    for (mark, link) in [(0, PodLink::Routed), (u32::MAX, PodLink::Bridged), (0, PodLink::Bridged)] {
        let env = TestEnv::new();
        let [exempt, other] = [(); 2].map(|()| env.add_pod(link));
        // Only `node_egress` sees that the Service leads to the endpoint.
        let mut nft = env.node.command("nft");
        nft.arg(format!(
            "table ip service {{
                chain prerouting {{
                    type nat hook prerouting priority -100; ip daddr {SERVICE_ADDRESS} dnat to {METADATA};
                }}
            }}"
        ));
        assert!(output(nft).status.success());
        let program = ForeignProgram::setting_mark(mark);
        for pod in [&exempt, &other] {
            run_tc(&env.node, &["qdisc", "add", "dev", &pod.host_ifname, "clsact"]);
            program.attach_filter(&env.node, &pod.host_ifname, TcAttachType::Ingress, 7);
        }
        assert!(reachable(&exempt.netns, METADATA) && reachable(&other.netns, SERVICE_ADDRESS));
        let rule = format!("[[exempt]]\nname = 'reader'\ninterface = '{}'", exempt.host_ifname);
        with_each_backend(|backend| {
            // Behind a bridge, exemptions need `from_pod`.
            let alone = (link == PodLink::Routed).then_some(&["node_egress"][..]);
            for hooks in [&["from_pod", "node_egress"][..]].into_iter().chain(alone) {
                let agent = env.agent().backend(backend).hooks(hooks).config(&rule).spawn_ready();
                assert!(reachable(&exempt.netns, METADATA), "{mark:#x}, {hooks:?}: {}", agent.log());
                env.assert_nothing_arrives(|| {
                    for address in [METADATA, SERVICE_ADDRESS] {
                        let outcome = http_get(&other.netns, address, SHORT);
                        assert!(!outcome.is_answer(), "{address}, {mark:#x}, {hooks:?}");
                    }
                });
                drop(agent);
                env.unload();
            }
        });
        assert!(reachable(&other.netns, METADATA));
    }
}
