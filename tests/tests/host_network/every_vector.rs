//! Attack vectors of a pod with hostNetwork.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};

use imds_tests::{
    DNS_PORT, METADATA, METADATA_V6, Netns, TestEnv, packets,
    poll::poll_until,
    probe::{LONG, SHORT, connect, http_exchange, http_get, http_get_at, icmp_echo, send_ipv4, udp_echo},
    skip_without_netns_cookie,
};

use crate::{AWS, CONTAINER, ECHO_PORT, HOST_NETWORK, IN_KIND, is_denied, send_raw, udp_socket};

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
    let echoes = || {
        udp.send(b"echo").unwrap();
        udp.recv(&mut [0; 16]).ok()
    };
    poll_until(LONG, "an echo before the agent starts", echoes);
    let (mut spared, _) = open();
    assert!(http_exchange(&mut spared, LONG).is_ok());

    let agent = env.agent().hooks(&[HOST_NETWORK]).spawn_ready();
    env.assert_nothing_arrives(|| {
        assert!(is_denied(udp.send(b"echo")));
        assert!(http_exchange(&mut tcp, SHORT).is_err());
    });
    drop(agent);
    env.unload();
    poll_until(LONG, "an echo after unload", echoes);
    let (mut again, _) = open();
    assert!(http_exchange(&mut again, LONG).is_ok());
}
