//! Pods behind netkit pairs. Programs on the peer run before TC ingress of the host side and can redirect packets past
//! it.

use imds_agent::datapath::sys::bpf::{self, MprogHook};
use imds_tests::{
    AttachMode, METADATA, NetkitMode, PacketSocket, Pod, PodLink, SERVICE, Status, TestEnv, add_pair,
    doctor::{all, doctor_report},
    foreign_bpf::ForeignProgram,
    known_here, packets,
    poll::poll_until,
    probe::{LONG, SHORT, reachable},
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
fn assert_enforced(env: &TestEnv, pod: &Pod) {
    let first = (Some("netkit".to_owned()), Some(true));
    // While the agent reorders programs, a copy of its program is attached for a moment, which `status` reports.
    env.status_when("from_pod is first, and nothing is degraded", |status| {
        status.find(&pod.host_ifname).is_some()
            && from_pod(status, pod) == first
            && status.state == "enforcing"
    });
    env.assert_blocked(pod);
    assert!(reachable(&pod.netns, SERVICE));
    assert!(reachable(&env.node, METADATA));
}

/// Returns the ids of the programs on the peer in execution order.
fn peer_programs(env: &TestEnv, pod: &Pod) -> Vec<u32> {
    let entries = env.node.run(|| bpf::entries(pod.host_ifindex, MprogHook::NetkitPeer));
    entries.unwrap().into_iter().map(|entry| entry.program).collect()
}

/// Returns a program that redirects packets of a pod to the uplink, past TC ingress of the host side.
fn redirecting_to_uplink(env: &TestEnv) -> ForeignProgram {
    let uplink = env.node.run(|| nix::net::if_::if_nametoindex(TestEnv::UPLINK)).unwrap();
    ForeignProgram::calling(REDIRECT_NEIGH, &[uplink, 0, 0, 0]).unwrap()
}

/// Adds permanent neighbour entries for a pair in layer 2, because a program that redirects all frames forwards neither
/// ARP requests nor replies to the node.
fn add_neighbours(env: &TestEnv, pod: &Pod) {
    if pod.link == PodLink::Netkit(NetkitMode::L2) {
        let text = |mac: [u8; 6]| mac.map(|byte| format!("{byte:02x}")).join(":");
        let add = |address: &str, mac, device: &str| {
            format!("neigh replace {address} lladdr {} dev {device} nud permanent", text(mac))
        };
        pod.netns.ip(&add("169.254.1.1", pod.gateway_mac, Pod::IFNAME));
        env.node.ip(&add(&pod.address.to_string(), pod.mac, &pod.host_ifname));
    }
}

#[test]
fn netkit_pods_are_denied() {
    if skip_without_netkit() {
        return;
    }
    for mode in MODES {
        for backend in [AttachMode::Tcx, AttachMode::Clsact] {
            let env = TestEnv::new();
            let pod = env.add_pod(PodLink::Netkit(mode));
            env.assert_open(&pod);
            let agent = env.start_agent(backend);
            assert_enforced(&env, &pod);
            env.assert_harmless(&pod);
            // The pin keeps the program attached without the agent.
            agent.kill9();
            env.assert_blocked(&pod);
            env.unload();
            env.assert_open(&pod);
            assert!(peer_programs(&env, &pod).is_empty());
        }
    }
}

/// Behind a bridge, `node_egress` recognizes an exempt pod by the packet's hash, also beside a pod that could set the mark.
#[test]
fn netkit_pods_on_a_bridge() {
    if skip_without_netkit() {
        return;
    }
    let env = TestEnv::new();
    let neighbour = env.add_pod(PodLink::Bridged);
    let [exempt, other] = [(); 2].map(|()| env.add_pod(PodLink::Netkit(NetkitMode::L2)));
    // The gateway of these pods.
    env.node.ip(&format!("addr add 169.254.1.1/32 dev {}", TestEnv::BRIDGE));
    for pod in [&exempt, &other] {
        let (address, host, bridge) = (pod.address, &pod.host_ifname, TestEnv::BRIDGE);
        env.node.ip(&format!("link set {host} master {bridge}\nroute replace {address}/32 dev {bridge}"));
    }
    let pods = [&neighbour, &exempt, &other];
    for pod in pods {
        poll_until(LONG, "an answer", || reachable(&pod.netns, METADATA).then_some(()));
    }
    let rule = format!("[[exempt]]\nname = 'reader'\ninterface = '{}'", exempt.host_ifname);
    let agent = env.agent().hooks(&["from_pod", "node_egress"]).config(&rule).spawn_ready();
    assert!(reachable(&exempt.netns, METADATA), "{}", agent.log());
    for pod in [&neighbour, &other] {
        env.assert_nothing_arrives(|| assert!(!reachable(&pod.netns, METADATA)));
    }
    drop(agent);
    env.unload();
    assert!(pods.iter().all(|pod| reachable(&pod.netns, METADATA)));
}

#[test]
fn netkit_redirects_come_second() {
    if skip_without_netkit() {
        return;
    }
    for mode in MODES {
        for is_later in [false, true] {
            let env = TestEnv::new();
            let pod = env.add_pod(PodLink::Netkit(mode));
            add_neighbours(&env, &pod);
            let program = redirecting_to_uplink(&env);
            let attach = || program.attach_netkit_peer_first(&env.node, pod.host_ifindex);
            let start = || env.agent().backend(AttachMode::Tcx).resync(1).spawn_ready();
            let (_link, agent) = if is_later {
                let agent = start();
                (attach(), agent)
            } else {
                let link = attach();
                env.assert_open(&pod);
                (link, start())
            };
            assert_enforced(&env, &pod);
            drop(agent);
            env.unload();
            assert_eq!(peer_programs(&env, &pod).len(), 1);
            env.assert_open(&pod);
        }
    }
}

#[test]
fn netkit_raw_frames_are_denied() {
    if skip_without_netkit() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Netkit(NetkitMode::L2));
    let _link = redirecting_to_uplink(&env).attach_netkit_peer_first(&env.node, pod.host_ifindex);
    let packet = packets::udp(pod.address, METADATA, b"raw");
    let send = || {
        // The device reports a denied frame to its sender (ENOBUFS).
        let _denied = PacketSocket::frames(&pod.netns, Pod::IFNAME).send(&packets::frame(&pod, &packet));
    };
    assert!(env.arrives(send));
    let agent = env.start_agent(AttachMode::Tcx);
    assert!(!env.arrives(send));
    drop(agent);
    env.unload();
    assert!(env.arrives(send));
}

/// A netkit device keeps the EtherType that the sender gives to its socket, and the node ignores the frame's.
#[test]
fn netkit_protocol_of_the_socket_counts() {
    if skip_without_netkit() {
        return;
    }
    let tag = [0_u16.to_be_bytes(), 0x0800_u16.to_be_bytes()].concat();
    for (protocol, ether_type) in
        [(libc::ETH_P_IP, 0x88b5_u16), (libc::ETH_P_IP, 0x86dd), (libc::ETH_P_8021Q, 0x88b5)]
    {
        let case = format!("protocol {protocol:#x}, EtherType {ether_type:#x}");
        let env = TestEnv::new();
        let pod = env.add_pod(PodLink::Netkit(NetkitMode::L2));
        let tag = if protocol == libc::ETH_P_8021Q { &tag[..] } else { &[] };
        let macs = [pod.gateway_mac, pod.mac].concat();
        let frame = [&macs[..], &ether_type.to_be_bytes(), tag, &packets::udp(pod.address, METADATA, b"raw")]
            .concat();
        let send = || {
            let _denied = PacketSocket::frames_as(&pod.netns, Pod::IFNAME, protocol).send(&frame);
        };
        assert!(env.arrives(send), "{case}");
        let agent = env.agent().backend(AttachMode::Tcx).hooks(&["from_pod"]).spawn_ready();
        assert!(!env.arrives(send), "{case}");
        drop(agent);
        env.unload();
        assert!(env.arrives(send), "{case}");
    }
}

/// Packets of a connection that is open before the agent starts need no call that the `socket` hook sees. Before Linux
/// 6.13 they count as the node's at `node_egress`.
#[test]
fn netkit_earlier_connections_are_cut() {
    if skip_without_netkit() {
        return;
    }
    for mode in MODES {
        for hooks in [&["from_pod"][..], &["from_pod", "node_egress", "socket"]] {
            let env = TestEnv::new();
            let pod = env.add_pod(PodLink::Netkit(mode));
            add_neighbours(&env, &pod);
            let _link = redirecting_to_uplink(&env).attach_netkit_peer_first(&env.node, pod.host_ifindex);
            let mut connection = env.open_connection(&pod.netns);
            assert!(connection.request(b"first request", LONG) && connection.respond(b"first response"));
            let agent = env.agent().backend(AttachMode::Tcx).hooks(&known_here(hooks)).spawn_ready();
            env.assert_nothing_arrives(|| {
                assert!(!connection.request(b"second request", SHORT), "{mode:?}, {hooks:?}");
            });
            // The link survives the agent.
            agent.kill9();
            env.assert_nothing_arrives(|| {
                assert!(!connection.has_arrived(b"second request", SHORT), "{mode:?}, {hooks:?}");
            });
            env.unload();
            // The pod retransmits the request, after a delay as long as the connection was cut.
            assert!(connection.has_arrived(b"second request", 4 * LONG), "{mode:?}, {hooks:?}");
        }
    }
}

#[test]
fn netkit_links_are_adopted() {
    if skip_without_netkit() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Netkit(NetkitMode::L3));
    env.start_agent(AttachMode::Tcx).kill9();
    let before = peer_programs(&env, &pod);
    let agent = env.start_agent(AttachMode::Tcx);
    poll_until(LONG, "the program of the second agent", || {
        let programs = peer_programs(&env, &pod);
        (programs.len() == 1 && programs != before).then_some(())
    });
    assert_enforced(&env, &pod);
    // Updates of an initial sync share one log line.
    agent.wait_for_log("updated", LONG);
    let log = agent.log();
    assert!(!log.contains("removed") && !log.contains("attached"), "{log}");
}

#[test]
fn netkit_detached_links_are_restored() {
    if skip_without_netkit() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Netkit(NetkitMode::L3));
    let _agent = env.agent().backend(AttachMode::Tcx).resync(1).spawn_ready();
    let pin = env.pin_dir().join(format!("links/from_pod_{}", pod.host_ifindex));
    imds_tests::foreign_bpf::detach_link(&pin);
    poll_until(LONG, "the link to be attached again", || {
        (peer_programs(&env, &pod).len() == 1).then_some(())
    });
    assert_enforced(&env, &pod);
}

#[test]
fn netkit_programs_are_listed() {
    /// Return code `NETKIT_NEXT`, which leaves the packet to the next program.
    const NEXT: i32 = -1;
    if skip_without_netkit() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Netkit(NetkitMode::L3));
    let _link = ForeignProgram::returning(NEXT).attach_netkit_peer_first(&env.node, pod.host_ifindex);
    let listed = || {
        let report = doctor_report(&env);
        let programs = all(&report, "tc_programs").into_iter().map(|check| &check["program"]);
        let mut of_kind = programs.filter(|program| program["kind"] == "netkit");
        let program = of_kind.next().unwrap_or_else(|| panic!("{report:#}"));
        assert_eq!((&program["at"], &program["hook"]), (&(&*pod.host_ifname).into(), &"peer".into()));
        let number = |key: &str| program[key].as_u64().expect("a number");
        (number("position"), number("count"), program["first"].as_bool())
    };
    assert_eq!(listed(), (1, 1, None));
    let _agent = env.start_agent(AttachMode::Tcx);
    assert_enforced(&env, &pod);
    assert_eq!(listed(), (2, 2, Some(false)));
}

/// The peer device supports no link, and both devices belong to the node.
#[test]
fn netkit_with_both_ends_on_node() {
    if skip_without_netkit() {
        return;
    }
    let env = TestEnv::new();
    add_pair(&env.node, "nk0", NetkitMode::L2, "nk1", &env.node).unwrap();
    env.node.ip("link set nk0 up\nlink set nk1 up");
    let agent = env.agent().hooks(&["from_pod", "node_egress"]).spawn_ready();
    let status = env.status();
    assert_eq!(status.state, "enforcing", "{:#?}", status.problems);
    assert!(reachable(&env.node, METADATA));
    assert!(!agent.log().contains("ERROR"), "{}", agent.log());
}
