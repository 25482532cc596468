//! `host_network`: pods in the node's own network namespace are distinguished from the node by their cgroup.

use std::{
    fs, io,
    io::ErrorKind,
    net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream, UdpSocket},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    sync::atomic::{AtomicU64, Ordering},
    thread,
};

use aya::util::KernelVersion;
use imds_tests::{
    Cgroup, DNS_PORT, METADATA, METADATA_V6, Netns, PodLink, SERVICE, SERVICE_V6, StopFlag, TestEnv,
    foreign_bpf, packets,
    poll::poll_until,
    probe::{
        LONG, SHORT, connect, http_exchange, http_get, http_get_at, icmp_echo, reachable, send_ipv4,
        udp_echo, udp_echo_at,
    },
    skip, skip_without_netns_cookie,
};
use nix::sys::socket::{MsgFlags, SockaddrIn, sendto};

const HOST_NETWORK: &str = "host_network";
const ALL: [&str; 4] = ["from_pod", "node_egress", "socket", HOST_NETWORK];
/// Configuration with endpoints of both address families.
const AWS: &str = "provider = 'aws'";
/// Cgroup of a container with systemd's cgroup driver, with shorter names than the kubelet's.
const CONTAINER: &str = "kubepods.slice/kubepods-besteffort.slice/pod7.slice/container.scope";
/// Cgroup of a container in kind.
const IN_KIND: &str = "kubelet.slice/kubelet-kubepods.slice/pod7.slice";
const ECHO_PORT: u16 = 7;

/// Sends a packet from a raw socket. The kernel adds the IP header.
fn send_raw(netns: &Netns, to: Ipv4Addr, protocol: libc::c_int) -> io::Result<()> {
    netns.run(|| {
        // SAFETY: the call takes no pointers.
        let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just created and has no other owner.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        let to = SockaddrIn::from(SocketAddrV4::new(to, 0));
        sendto(socket.as_raw_fd(), &[0, 7, 0, 7, 0, 16, 0, 0], &to, MsgFlags::empty())?;
        Ok(())
    })
}

fn udp_socket(netns: &Netns, any: &str) -> UdpSocket {
    let socket = netns.run(|| UdpSocket::bind(any)).expect("a UDP socket");
    socket.set_read_timeout(Some(SHORT)).expect("set a timeout");
    socket
}

/// Reports whether the echo server returns a datagram from an unconnected socket.
fn echoes(netns: &Netns, any: &str, to: impl Into<IpAddr>) -> bool {
    let socket = udp_socket(netns, any);
    socket.send_to(b"echo", (to.into(), ECHO_PORT)).and_then(|_| socket.recv(&mut [0; 16])).is_ok()
}

fn mapped_tcp(netns: &Netns) -> bool {
    let address = SocketAddr::from((METADATA.to_ipv6_mapped(), 80));
    let stream = netns.run(|| TcpStream::connect_timeout(&address, SHORT));
    stream.and_then(|mut stream| http_exchange(&mut stream, SHORT)).is_ok()
}

fn is_denied<T>(result: io::Result<T>) -> bool {
    result.is_err_and(|error| error.kind() == ErrorKind::PermissionDenied)
}

/// Address that a rule of the node translates into the endpoint's, like a Service with that backend.
const CLUSTER_IP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 80);

fn redirect(node: &Netns) {
    let mut command = node.command("nft");
    command.arg(format!(
        "table ip service {{ chain output {{ type nat hook output priority -100; ip daddr {CLUSTER_IP} dnat to {METADATA}; \
         }}; }}"
    ));
    let output = imds_tests::output(command);
    assert!(output.status.success(), "nft: {}", String::from_utf8_lossy(&output.stderr));
}

/// Asserts that every attack vector of a process in this cgroup and in the node's network namespace is denied.
fn assert_every_vector_blocked(path: &str) {
    let env = TestEnv::new().with_ipv6();
    let container = env.add_cgroup(path);
    let node = &*env.node;
    redirect(node);
    let mut vectors = env
        .vectors(&[HOST_NETWORK])
        .in_cgroup(&container)
        .config(AWS)
        .vector("TCP", || http_get(node, METADATA, SHORT).is_answer())
        .vector("TCP to another port", || http_get_at(node, (METADATA, DNS_PORT).into(), SHORT).is_answer())
        .vector("TCP to a mapped address", || mapped_tcp(node))
        .vector("TCP over IPv6", || http_get(node, METADATA_V6, SHORT).is_answer())
        .vector("UDP", || echoes(node, "0.0.0.0:0", METADATA))
        .vector("UDP to a mapped address", || echoes(node, "[::]:0", METADATA.to_ipv6_mapped()))
        .vector("UDP over IPv6", || echoes(node, "[::]:0", METADATA_V6))
        .vector("UDP, connected", || udp_echo(node, METADATA, SHORT).is_answer())
        .vector("UDP over IPv6, connected", || udp_echo(node, METADATA_V6, SHORT).is_answer())
        .vector("TCP to a Service", || http_get(node, CLUSTER_IP, SHORT).is_answer())
        .vector("UDP to a Service", || udp_echo(node, CLUSTER_IP, SHORT).is_answer())
        .vector("ICMP echo", || icmp_echo(node, METADATA, SHORT).is_answer())
        .one_vector("IP_HDRINCL", || {
            let packet = packets::udp(env.node_address(), METADATA, b"crafted");
            // Ignores the result: the arrivals show whether the packet was denied.
            let _ = send_ipv4(node, METADATA, &[packet]);
        });
    for (name, protocol) in [("TCP", 6), ("UDP", 17), ("SCTP", 132), ("an experiment", 253)] {
        vectors = vectors.one_vector(format!("{name} from a raw socket"), move || {
            let _ = send_raw(node, METADATA, protocol);
        });
    }
    vectors.assert_blocked_all();
}

#[test]
fn host_network_pod_every_vector() {
    if skip_without_netns_cookie() {
        return;
    }
    assert_every_vector_blocked(CONTAINER);
}

#[test]
fn host_network_pod_every_vector_kind() {
    if skip_without_netns_cookie() {
        return;
    }
    assert_every_vector_blocked(IN_KIND);
}

#[test]
fn earlier_connection_is_cut() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let container = env.add_cgroup(CONTAINER);
    let open = || {
        container.run(|| {
            let udp = udp_socket(&env.node, "0.0.0.0:0");
            udp.connect((METADATA, ECHO_PORT)).unwrap();
            (env.node.run(|| connect(METADATA, LONG)).unwrap(), udp)
        })
    };
    let (mut tcp, udp) = open();
    udp.send(b"echo").unwrap();
    assert!(udp.recv(&mut [0; 16]).is_ok());
    let (mut spared, _) = open();
    assert!(http_exchange(&mut spared, LONG).is_ok());

    let agent = env.agent().hooks(&[HOST_NETWORK]).spawn_ready();
    env.assert_nothing_arrives(|| {
        assert!(is_denied(udp.send(b"echo")));
        assert!(http_exchange(&mut tcp, SHORT).is_err());
    });
    drop(agent);
    env.unload();
    udp.send(b"echo").unwrap();
    assert!(udp.recv(&mut [0; 16]).is_ok());
    let (mut again, _) = open();
    assert!(http_exchange(&mut again, LONG).is_ok());
}

/// Asserts that unprotected traffic of a process on the node works.
fn assert_reaches(netns: &Netns, addresses: &[IpAddr]) {
    for &address in addresses {
        assert!(reachable(netns, address), "TCP to {address}");
        assert!(udp_echo(netns, address, LONG).is_answer(), "UDP to {address}");
        if let IpAddr::V4(address) = address {
            assert!(icmp_echo(netns, address, LONG).is_answer(), "ICMP to {address}");
        }
    }
}

#[test]
fn node_and_unprotected_addresses_pass() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new().with_ipv6();
    let container = env.add_cgroup(CONTAINER);
    let kubelet = env.add_cgroup("system.slice/kubelet.service");
    let config = "provider = 'none'
        [[endpoint]]
        name = 'four'
        address = '169.254.169.254'
        allow_ports = ['udp/53', 'tcp/53']
        [[endpoint]]
        name = 'six'
        address = 'fd00:ec2::254'
        allow_ports = ['udp/53', 'tcp/53']";
    let agent = env.agent().hooks(&ALL).config(config).spawn_ready();
    let services = [SERVICE.into(), SERVICE_V6.into()];
    let endpoints = [METADATA.into(), METADATA_V6.into()];
    assert_reaches(&env.node, &[&services[..], &endpoints].concat());
    kubelet.run(|| assert_reaches(&env.node, &[&services[..], &endpoints].concat()));
    container.run(|| {
        assert_reaches(&env.node, &services);
        for endpoint in endpoints {
            let dns = (endpoint, DNS_PORT).into();
            assert!(http_get_at(&env.node, dns, LONG).is_answer(), "TCP to {dns}");
            assert!(udp_echo_at(&env.node, dns, LONG).is_answer(), "UDP to {dns}");
            assert!(!http_get(&env.node, endpoint, SHORT).is_answer(), "TCP to {endpoint}");
            assert!(!udp_echo(&env.node, endpoint, SHORT).is_answer(), "UDP to {endpoint}");
        }
    });
    let status = env.status();
    assert_eq!((status.state.as_str(), &status.hooks[..]), ("enforcing", &ALL.map(str::to_owned)[..]));
    let counts = status.host_network.expect("host_network is on").counts;
    assert!(counts.allowed.packets > 0 && counts.denied.packets == 4, "{counts:?}");
    drop(agent);
    env.unload();
    container.run(|| assert_reaches(&env.node, &endpoints));
}

#[test]
fn pod_with_own_netns_is_counted_once() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let container = env.add_cgroup(CONTAINER);
    assert!(container.run(|| reachable(&pod.netns, METADATA)));
    let agent = env.agent().hooks(&ALL).spawn_ready();
    let denied = || {
        let status = env.status();
        let sockets = status.sockets.as_ref().expect("the hook is on").counts;
        let host = status.host_network.as_ref().expect("host_network is on").counts;
        let from_pod = status.interface(&pod.host_ifname).counts;
        [from_pod, sockets, host, status.total].map(|counts| counts.denied.packets)
    };
    assert!(container.run(|| !http_get(&pod.netns, METADATA, SHORT).is_answer()));
    assert_eq!(denied(), [0, 1, 0, 1]);
    if KernelVersion::current().unwrap() < KernelVersion::new(6, 15, 0) {
        skip("packets", "programs of cgroups do not see a socket's network namespace on this kernel");
    } else {
        container.run(|| send_raw(&pod.netns, METADATA, 132)).unwrap();
        env.status_when("the packet is counted", |status| status.total.denied.packets == 2);
        assert_eq!(denied(), [1, 1, 0, 2]);
    }
    // Calls and packets in the node's namespace are denied too.
    assert!(container.run(|| !http_get(&env.node, METADATA, SHORT).is_answer()));
    assert!(is_denied(container.run(|| send_raw(&env.node, METADATA, 132))));
    let [_, _, host, _] = denied();
    assert_eq!(host, 2);
    drop(agent);
    env.unload();
    assert!(container.run(|| reachable(&pod.netns, METADATA)));
}

#[test]
fn disabled_host_network_denies_nothing() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let container = env.add_cgroup(CONTAINER);
    let is_open = || container.run(|| reachable(&env.node, METADATA));
    let is_blocked = || container.run(|| !http_get(&env.node, METADATA, SHORT).is_answer());
    let agent = env.agent().hooks(&ALL[..3]).spawn_ready();
    assert!(is_open());
    assert!(env.status().host_network.is_none());
    agent.kill9();
    let agent = env.agent().hooks(&ALL).spawn_ready();
    assert!(is_blocked());
    agent.kill9();
    assert!(is_blocked());
    // The next agent has the hook off and removes its links.
    let agent = env.agent().hooks(&ALL[..3]).spawn_ready();
    assert!(is_open());
    assert_eq!(host_links(&env), [""; 0]);
    agent.kill9();
    // The mode `off` disables the hook as well.
    let agent = env.agent().hooks(&[HOST_NETWORK]).config("mode = 'off'").spawn_ready();
    assert!(is_open());
    drop(agent);
    env.unload();
    assert!(is_open());
}

/// Returns the names of the pinned links for cgroups of Kubernetes pods.
fn host_links(env: &TestEnv) -> Vec<String> {
    let entries = fs::read_dir(env.pin_dir().join("links")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with("host_")).collect()
}

#[test]
fn added_and_removed_cgroups_are_followed() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    // No resync runs during the test, so that only events can report the cgroups.
    let agent = env.agent().hooks(&[HOST_NETWORK]).resync(3600).spawn();
    agent.wait_for_log("hostNetwork pods are not restricted", LONG);
    let status = env.status_when("the problem is reported", |status| status.agent.ready);
    assert_eq!(status.state, "degraded");
    let [problem] = &status.problems[..] else { panic!("{:#?}", status.problems) };
    assert!(problem.problem.contains("hostNetwork") && problem.remedy.contains("cgroup"), "{problem:?}");

    let mut cgroups = Vec::new();
    for (count, path) in (1..).zip(["kubepods", CONTAINER, IN_KIND]) {
        let cgroup = env.add_cgroup(path);
        assert_ne!(env.status().state, "unloaded");
        env.status_when("the programs are attached", |status| {
            let host = status.host_network.as_ref().expect("host_network is on");
            host.attached && host.cgroups.len() == count && status.state == "enforcing"
        });
        assert!(cgroup.run(|| is_denied(env.node.run(|| connect(METADATA, SHORT)))), "{path}");
        cgroups.push(cgroup);
    }
    assert!(reachable(&env.node, METADATA));
    assert_eq!(host_links(&env).len(), 15);
    drop(cgroups);
    poll_until(LONG, "the pins to be removed", || host_links(&env).is_empty().then_some(()));
    drop(agent);
    env.unload();
    let cgroup = env.add_cgroup(CONTAINER);
    assert!(cgroup.run(|| reachable(&env.node, METADATA)));
}

#[test]
fn once_without_kubepods_cgroup_fails() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let output = env.agent().hooks(&ALL).once();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(
        stderr.contains("hostNetwork pods") && stderr.contains(env.cgroup().to_str().unwrap()),
        "{stderr}"
    );
    let _container = env.add_cgroup(CONTAINER);
    let output = env.agent().hooks(&ALL).once();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn audit_counts_and_passes() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let container = env.add_cgroup(CONTAINER);
    let _agent = env.agent().hooks(&[HOST_NETWORK]).config("mode = 'audit'").spawn_ready();
    let before = env.received_packets();
    container.run(|| send_raw(&env.node, METADATA, 132)).unwrap();
    assert_eq!(env.received_packets().total(), before.total() + 1);
    let counts = || env.status().host_network.expect("host_network is on").counts;
    assert_eq!((counts().audited.packets, counts().denied.packets), (1, 0));
    assert!(container.run(|| reachable(&env.node, METADATA)));
    assert!(counts().audited.packets > 2 && counts().denied.packets == 0, "{:?}", counts());
}

#[test]
fn detached_host_network_is_restored() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let container = env.add_cgroup(CONTAINER);
    let agent = env.agent().hooks(&[HOST_NETWORK]).resync(1).spawn_ready();
    let kubepods = env.status().host_network.expect("host_network is on").cgroups[0];
    let is_blocked = || is_denied(container.run(|| send_raw(&env.node, METADATA, 132)));
    assert!(is_blocked());
    foreign_bpf::detach_link(&env.pin_dir().join(format!("links/host_egress_{kubepods}")));
    agent.wait_for_log("attached imds_host_out", LONG);
    poll_until(LONG, "packets to be denied again", || is_blocked().then_some(()));
    fs::remove_file(env.pin_dir().join(format!("links/host_connect4_{kubepods}"))).unwrap();
    agent.wait_for_log("pinned the link of imds_host_conn4", LONG);
    env.status_when("the agent is ready", |status| status.is_ready() && status.state == "enforcing");
}

/// Sends to the metadata service with a sendto call, with a connect call and from a raw socket, until `stop` is set.
fn send_until(env: &TestEnv, container: &Cgroup, stop: &StopFlag, tried: &AtomicU64) {
    container.run(|| {
        let (named, connected) = (udp_socket(&env.node, "0.0.0.0:0"), udp_socket(&env.node, "0.0.0.0:0"));
        while !stop.is_set() {
            // The call is denied, or its packet is counted on arrival.
            let _ = named.send_to(b"echo", (METADATA, ECHO_PORT));
            let _ = connected.connect((METADATA, ECHO_PORT)).and_then(|()| connected.send(b"echo"));
            let _ = send_raw(&env.node, METADATA, 132);
            tried.fetch_add(3, Ordering::Relaxed);
        }
    });
}

#[test]
fn host_network_survives_restart() {
    const RESTARTS: usize = 10;
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let container = env.add_cgroup(CONTAINER);
    let (stop, tried) = (StopFlag::default(), AtomicU64::new(0));
    assert!(env.arrives(|| {
        for protocol in [17, 132] {
            container.run(|| send_raw(&env.node, METADATA, protocol)).unwrap();
        }
    }));
    let agent = env.agent().hooks(&[HOST_NETWORK]).spawn_ready();
    let before = env.received_packets();
    let agent = thread::scope(|scope| {
        let mut agent = agent;
        let _stop_on_drop = stop.set_on_drop();
        scope.spawn(|| send_until(&env, &container, &stop, &tried));
        for _ in 0..RESTARTS {
            agent.kill9();
            let before = tried.load(Ordering::Relaxed);
            poll_until(LONG, "attempts without an agent", || {
                (tried.load(Ordering::Relaxed) > before + 30).then_some(())
            });
            agent = env.agent().hooks(&[HOST_NETWORK]).spawn_ready();
        }
        agent
    });
    let tried = tried.into_inner();
    assert_eq!(env.received_packets(), before, "of {tried} attempts during {RESTARTS} restarts");
    let denied = env.status().host_network.expect("host_network is on").counts.denied.packets;
    assert!(denied >= tried, "{denied} of {tried} counted");
    drop(agent);
    env.status().assert_lacks_only_an_agent();
    env.unload();
    assert!(container.run(|| reachable(&env.node, METADATA)));
}
