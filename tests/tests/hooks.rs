//! Each hook alone: the traffic that it denies, which passes before and after.

use std::{
    fs,
    io::ErrorKind,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
};

use imds_agent::datapath::object::can_choose_errno;
use imds_tests::{
    METADATA, Netns, PodLink, Problem, SERVICE, TestEnv, TunMode, hook, open_tun,
    probe::{LONG, Outcome, SHORT, http_get, reachable},
    set_hardware_type, skip_without_netns_cookie, with_each_backend,
};

const LINKS: [PodLink; 2] = [PodLink::Routed, PodLink::Bridged];

#[test]
fn node_egress_denies_pods_on_any_link() {
    with_each_backend(|backend| {
        let env = TestEnv::new();
        let pods = LINKS.map(|link| env.add_pod(link));
        for pod in &pods {
            env.assert_open(pod);
        }

        let agent = env.agent().backend(backend).hooks(&["node_egress"]).spawn_ready();
        for pod in &pods {
            env.assert_blocked(pod);
            env.assert_harmless(pod);
        }
        let status = env.status();
        let uplink = status.interface(TestEnv::UPLINK);
        assert_eq!((uplink.role.as_str(), uplink.attach_mode()), ("uplink", Some(backend.name())));
        assert!(uplink.counts.denied.packets > 0);
        assert!(pods.iter().all(|pod| status.interface(&pod.host_ifname).attachment("from_pod").is_none()));

        // A pod that starts while no agent runs is denied from its first packet. The missing agent is the only problem.
        agent.kill9();
        let late = env.add_pod(PodLink::Routed);
        env.assert_blocked(&late);
        env.status().assert_lacks_only_an_agent();

        env.unload();
        assert!(!hook::has_clsact(&env.node, TestEnv::UPLINK));
        for pod in pods.iter().chain([&late]) {
            env.assert_open(pod);
        }
    });
}

fn udp_socket(netns: &Netns, any: &str) -> UdpSocket {
    netns.run(|| UdpSocket::bind(any).expect("a UDP socket"))
}

/// Returns the errors of every call with which a socket in a namespace can name the endpoint.
fn errors(netns: &Netns, endpoint: Ipv4Addr) -> Vec<(&'static str, Option<ErrorKind>)> {
    let (v4, mapped) = (SocketAddr::from((endpoint, 80)), SocketAddr::from((endpoint.to_ipv6_mapped(), 80)));
    let kind = |result: std::io::Result<()>| result.err().map(|error| error.kind());
    let tcp = |address| {
        let connected = netns.run(|| std::net::TcpStream::connect_timeout(&address, LONG));
        kind(connected.map(drop))
    };
    let (udp4, udp6) = (udp_socket(netns, "0.0.0.0:0"), udp_socket(netns, "[::]:0"));
    vec![
        ("sendto on UDP", kind(udp4.send_to(b"x", v4).map(drop))),
        ("sendto on UDP by a mapped address", kind(udp6.send_to(b"x", mapped).map(drop))),
        ("connect on UDP", kind(udp4.connect(v4))),
        ("connect on UDP by a mapped address", kind(udp6.connect(mapped))),
        ("connect on TCP", tcp(v4)),
        ("connect on TCP by a mapped address", tcp(mapped)),
    ]
}

#[test]
fn errno_of_denied_calls() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    for (errno, chosen) in [
        ("EPERM", ErrorKind::PermissionDenied),
        ("ECONNREFUSED", ErrorKind::ConnectionRefused),
        ("EHOSTUNREACH", ErrorKind::HostUnreachable),
        ("ENETUNREACH", ErrorKind::NetworkUnreachable),
    ] {
        // Older kernels lack the helper for the error number.
        let expected = if can_choose_errno() { chosen } else { ErrorKind::PermissionDenied };
        let config = format!(
            "on_deny_errno = '{errno}'\n[hooks]\nfrom_pod = false\nnode_egress = false\nsocket = true\nsendmsg = true"
        );
        let path = env.scratch_dir().join("errno.toml");
        fs::write(&path, config).unwrap();
        let agent = env.agent().config_file(path.to_str().unwrap()).spawn_ready();
        env.assert_nothing_arrives(|| {
            for (call, error) in env.in_cgroup(|| errors(&pod.netns, METADATA)) {
                assert_eq!(error, Some(expected), "{call} with {errno}");
            }
        });
        let verified = env.in_cgroup(|| env.imds_agent(&["verify"]).output());
        assert!(verified.status.success(), "{verified:?}");
        drop(agent);
    }
    env.unload();
    env.assert_open(&pod);
}

#[test]
fn socket_hook_denies_calls_immediately() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pods = LINKS.map(|link| env.add_pod(link));
    let of = |netns: &Netns, endpoint| env.in_cgroup(|| errors(netns, endpoint));
    for pod in &pods {
        assert!(of(&pod.netns, METADATA).iter().all(|(_, error)| error.is_none()));
    }

    let agent = env.agent().hooks(&["socket"]).spawn_ready();
    for pod in &pods {
        env.assert_nothing_arrives(|| {
            for (call, error) in of(&pod.netns, METADATA) {
                assert_eq!(error, Some(ErrorKind::PermissionDenied), "{call}");
            }
        });
        assert!(of(&pod.netns, SERVICE).iter().all(|(_, error)| error.is_none()));
        // A socket outside of the agent's cgroup is not affected.
        assert!(reachable(&pod.netns, METADATA));
    }
    // The node's own sockets in the same cgroup are not affected.
    assert!(of(&env.node, METADATA).iter().all(|(_, error)| error.is_none()));
    assert!(env.in_cgroup(|| reachable(&env.node, METADATA)));
    let sockets = env.status().sockets.expect("the hook is on");
    assert!(sockets.attached && sockets.counts.denied.packets >= 12, "{sockets:?}");

    // The hook survives the agent, covers pods that start without one, and is adopted by the next agent.
    agent.kill9();
    let late = env.add_pod(PodLink::Bridged);
    assert!(of(&late.netns, METADATA).iter().all(|(_, error)| *error == Some(ErrorKind::PermissionDenied)));
    let before = env.status().total.denied.packets;
    let agent = env.agent().hooks(&["socket"]).spawn_ready();
    assert!(of(&late.netns, METADATA).iter().all(|(_, error)| *error == Some(ErrorKind::PermissionDenied)));
    assert_eq!(env.status().total.denied.packets, before + 6);
    drop(agent);

    env.unload();
    assert!(
        pods.iter()
            .chain([&late])
            .all(|pod| of(&pod.netns, METADATA).iter().all(|(_, error)| error.is_none()))
    );
}

#[test]
fn next_agent_changes_the_hooks() {
    if skip_without_netns_cookie() {
        return;
    }
    with_each_backend(|backend| {
        let env = TestEnv::new();
        let pod = env.add_pod(PodLink::Routed);
        let effective = || {
            let status = env.status();
            let ours = |name: &str| hook::programs(&env.node, name).iter().any(hook::Attached::is_ours);
            let uplink = status.interface(TestEnv::UPLINK);
            let egress = uplink.attachment("node_egress").is_some_and(|hook| hook.attach_mode.is_some());
            let attached = status.sockets.is_some_and(|sockets| sockets.attached);
            [ours(&pod.host_ifname), egress, attached]
        };
        for (on, expected) in [
            (&["from_pod", "node_egress", "socket"][..], [true, true, true]),
            (&["socket"], [false, false, true]),
            (&["node_egress"], [false, true, false]),
            (&["from_pod"], [true, false, false]),
        ] {
            let agent = env.agent().backend(backend).hooks(on).spawn_ready();
            assert_eq!(effective(), expected, "{on:?}");
            assert!(env.in_cgroup(|| !http_get(&pod.netns, METADATA, SHORT).is_answer()), "{on:?}");
            agent.kill9();
        }
        env.unload();
        env.assert_open(&pod);
    });
}

#[test]
fn detached_socket_hook_is_restored() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let agent = env.agent().hooks(&["socket"]).resync(1).spawn_ready();
    let denied = || {
        let outcome = env.in_cgroup(|| http_get(&pod.netns, METADATA, SHORT));
        matches!(outcome, Outcome::Error(error) if error.kind() == ErrorKind::PermissionDenied)
    };
    assert!(denied());
    imds_tests::foreign_bpf::detach_link(&env.pin_dir().join("links/connect4"));
    agent.wait_for_log("attached imds_connect4", LONG);
    imds_tests::poll::poll_until(LONG, "connect4 to be attached again", || denied().then_some(()));
    env.status_when("the agent is ready", |status| status.is_ready() && status.state == "enforcing");
}

#[test]
fn default_config_has_all_hooks() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Bridged);
    let empty = env.scratch_dir().join("empty.toml");
    fs::write(&empty, "").unwrap();
    let cgroup = env.cgroup().to_str().unwrap();
    let agent = env.agent().config_file(empty.to_str().unwrap()).args(&["--cgroup", cgroup]);
    let _agent = agent.spawn_ready();
    assert_eq!(env.status().hooks, ["from_pod", "node_egress", "socket", "local_service"]);
    env.in_cgroup(|| {
        env.assert_blocked(&pod);
        env.assert_harmless(&pod);
    });
}

/// A TUN device stands for IP over InfiniBand, whose link-layer header the programs do not parse.
#[test]
fn unsupported_hardware_type_is_reported() {
    const DEVICE: &str = "ib0";
    let env = TestEnv::new();
    let device = open_tun(&env.node, DEVICE, TunMode::Tun);
    set_hardware_type(&device, libc::ARPHRD_INFINIBAND);
    env.node.ip(&format!("link set {DEVICE} up"));
    let agent = env.agent().hooks(&["from_pod", "node_egress"]).spawn_ready();
    let status = env.status();
    assert_eq!(status.interface(DEVICE).role, "other");
    assert!(status.problems.is_empty(), "{:?}", status.problems);

    env.node.ip(&format!("route add {METADATA}/32 dev {DEVICE} metric 500"));
    let is_of_device = |problem: &Problem| problem.interface.as_deref() == Some(DEVICE);
    let status = env.status_when("a problem", |status| status.problems.iter().any(is_of_device));
    assert_eq!((&*status.interface(DEVICE).role, status.interface(DEVICE).is_attached()), ("uplink", false));
    assert_eq!(env.imds_agent(&["status"]).output().status.code(), Some(3));
    agent.wait_for_log("the link-layer header of its hardware type, 32; route protected endpoints", LONG);

    env.node.ip(&format!("route delete {METADATA}/32 dev {DEVICE}"));
    env.status_when("no problem", |status| status.problems.is_empty());
}
