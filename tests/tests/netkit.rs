//! Pods behind netkit pairs. Programs on the peer run before TC ingress of the host side and can redirect packets past
//! it.

use imds_agent::datapath::bpf::{self, MprogHook};
use imds_tests::{
    AttachMode, METADATA, NetkitMode, PacketSocket, Pod, PodLink, SERVICE, Status, World, add_pair,
    foreign::Foreign,
    packets,
    poll::poll_until,
    probe::{LONG, reachable},
    skip_without_netkit,
};

/// Helper function `bpf_redirect_neigh` of include/uapi/linux/bpf.h.
const REDIRECT_NEIGH: u32 = 152;
const MODES: [NetkitMode; 2] = [NetkitMode::L2, NetkitMode::L3];

/// Returns attach mode and order of `from_pod` from the status.
fn from_pod(status: &Status, pod: &Pod) -> (Option<String>, Option<bool>) {
    let interface = status.interface(&pod.host_ifname);
    (interface.attach_mode().map(str::to_owned), interface.is_first())
}

#[track_caller]
fn assert_enforced(world: &World, pod: &Pod) {
    let first = (Some("netkit".to_owned()), Some(true));
    let status = world.status_when("from_pod is first", |status| {
        status.find(&pod.host_ifname).is_some() && from_pod(status, pod) == first
    });
    assert_eq!(status.state, "enforcing", "{:#?}", status.problems);
    world.assert_blocked(pod);
    assert!(reachable(&pod.netns, SERVICE));
    assert!(reachable(&world.node, METADATA));
}

/// Returns the ids of the programs on the peer in execution order.
fn peer_programs(world: &World, pod: &Pod) -> Vec<u32> {
    let entries = world.node.run(|| bpf::entries(pod.host_ifindex, MprogHook::NetkitPeer));
    entries.unwrap().into_iter().map(|entry| entry.program).collect()
}

/// Returns a program that redirects packets of a pod to the uplink, past TC ingress of the host side.
fn redirecting_to_uplink(world: &World) -> Foreign {
    let uplink = world.node.run(|| nix::net::if_::if_nametoindex(World::UPLINK)).unwrap();
    Foreign::calling(REDIRECT_NEIGH, &[uplink, 0, 0, 0]).unwrap()
}

#[test]
fn netkit_pods_are_denied() {
    if skip_without_netkit() {
        return;
    }
    for mode in MODES {
        for backend in [AttachMode::Tcx, AttachMode::Clsact] {
            let world = World::new();
            let pod = world.add_pod(PodLink::Netkit(mode));
            world.assert_open(&pod);
            let agent = world.start_agent(backend);
            assert_enforced(&world, &pod);
            world.assert_harmless(&pod);
            // The pin keeps the program attached without the agent.
            agent.kill9();
            world.assert_blocked(&pod);
            world.unload();
            world.assert_open(&pod);
            assert!(peer_programs(&world, &pod).is_empty());
        }
    }
}

#[test]
fn netkit_redirects_come_second() {
    if skip_without_netkit() {
        return;
    }
    for mode in MODES {
        for is_later in [false, true] {
            let world = World::new();
            let pod = world.add_pod(PodLink::Netkit(mode));
            if mode == NetkitMode::L2 {
                // The program forwards neither ARP requests nor replies to the node.
                let text = |mac: [u8; 6]| mac.map(|byte| format!("{byte:02x}")).join(":");
                let add = |address: &str, mac, device: &str| {
                    format!("neigh replace {address} lladdr {} dev {device} nud permanent", text(mac))
                };
                pod.netns.ip(&add("169.254.1.1", pod.gateway_mac, Pod::IFNAME));
                world.node.ip(&add(&pod.address.to_string(), pod.mac, &pod.host_ifname));
            }
            let program = redirecting_to_uplink(&world);
            let attach = || program.attach_netkit_peer_first(&world.node, pod.host_ifindex);
            let start = || world.agent().backend(AttachMode::Tcx).resync(1).spawn_ready();
            let (_link, agent) = if is_later {
                let agent = start();
                (attach(), agent)
            } else {
                let link = attach();
                world.assert_open(&pod);
                (link, start())
            };
            assert_enforced(&world, &pod);
            drop(agent);
            world.unload();
            assert_eq!(peer_programs(&world, &pod).len(), 1);
            world.assert_open(&pod);
        }
    }
}

#[test]
fn netkit_raw_frames_are_denied() {
    if skip_without_netkit() {
        return;
    }
    let world = World::new();
    let pod = world.add_pod(PodLink::Netkit(NetkitMode::L2));
    let _link = redirecting_to_uplink(&world).attach_netkit_peer_first(&world.node, pod.host_ifindex);
    let packet = packets::udp(pod.address, METADATA, b"raw");
    let send = || {
        // The device reports a denied frame to its sender (ENOBUFS).
        let _denied = PacketSocket::frames(&pod.netns, Pod::IFNAME).send(&packets::frame(&pod, &packet));
    };
    assert!(world.arrives(send));
    let agent = world.start_agent(AttachMode::Tcx);
    assert!(!world.arrives(send));
    drop(agent);
    world.unload();
    assert!(world.arrives(send));
}

#[test]
fn netkit_links_are_adopted() {
    if skip_without_netkit() {
        return;
    }
    let world = World::new();
    let pod = world.add_pod(PodLink::Netkit(NetkitMode::L3));
    world.start_agent(AttachMode::Tcx).kill9();
    let before = peer_programs(&world, &pod);
    let agent = world.start_agent(AttachMode::Tcx);
    poll_until(LONG, "the program of the second agent", || {
        let programs = peer_programs(&world, &pod);
        (programs.len() == 1 && programs != before).then_some(())
    });
    assert_enforced(&world, &pod);
    let log = agent.log();
    // Updates of an initial sync share one log line.
    assert!(log.contains("updated") && !log.contains("removed") && !log.contains("attached"), "{log}");
}

#[test]
fn netkit_detached_links_are_restored() {
    if skip_without_netkit() {
        return;
    }
    let world = World::new();
    let pod = world.add_pod(PodLink::Netkit(NetkitMode::L3));
    let _agent = world.agent().backend(AttachMode::Tcx).resync(1).spawn_ready();
    let pin = world.pin_dir().join(format!("links/from_pod_{}", pod.host_ifindex));
    imds_tests::foreign::detach_link(&pin);
    poll_until(LONG, "the link to be attached again", || {
        (peer_programs(&world, &pod).len() == 1).then_some(())
    });
    assert_enforced(&world, &pod);
}

/// The peer device supports no link, and both devices belong to the node.
#[test]
fn netkit_with_both_ends_on_node() {
    if skip_without_netkit() {
        return;
    }
    let world = World::new();
    add_pair(&world.node, "nk0", NetkitMode::L2, "nk1", &world.node).unwrap();
    world.node.ip("link set nk0 up\nlink set nk1 up");
    let agent = world.agent().hooks(&["from_pod", "node_egress"]).spawn_ready();
    let status = world.status();
    assert_eq!(status.state, "enforcing", "{:#?}", status.problems);
    assert!(reachable(&world.node, METADATA));
    assert!(!agent.log().contains("ERROR"), "{}", agent.log());
}
