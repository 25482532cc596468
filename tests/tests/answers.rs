//! Replies to denied senders (`on_deny = "reject"`): the sender's own stack accepts them immediately as the endpoint's.

use std::{
    io::{self, ErrorKind},
    net::{IpAddr, Ipv4Addr, TcpStream},
};

use imds_tests::{
    METADATA, METADATA_V6, Netns, PacketSocket, Pod, PodLink, TestEnv, packets,
    probe::{LONG, Outcome, SHORT, http_exchange, http_get, reachable, udp_echo},
    with_each_backend,
};

const REJECT: &str = "provider = 'aws'\non_deny = 'reject'";
const DROP: &str = "provider = 'aws'\non_deny = 'drop'";
const TC_HOOKS: [&str; 2] = ["from_pod", "node_egress"];

/// Reports whether the connection is refused. The timeout is longer than any reply takes.
fn refused(netns: &Netns, address: impl Into<IpAddr>) -> bool {
    matches!(http_get(netns, address, LONG), Outcome::Refused)
}

/// Reports whether a connected UDP socket receives the error of an ICMP reply: EHOSTUNREACH for IPv4
/// (`icmp_err_convert`, net/ipv4/icmp.c), EACCES for IPv6 (`tab_unreach`, net/ipv6/icmp.c).
fn prohibited(netns: &Netns, address: impl Into<IpAddr>) -> bool {
    match udp_echo(netns, address, LONG) {
        Outcome::Error(error) => matches!(error.raw_os_error(), Some(libc::EHOSTUNREACH | libc::EACCES)),
        Outcome::Answer(_) | Outcome::Timeout | Outcome::Refused => false,
    }
}

#[test]
fn reject_replies_at_each_hook() {
    with_each_backend(|backend| {
        let env = TestEnv::new().with_ipv6();
        let pods = [PodLink::Routed, PodLink::Bridged].map(|link| env.add_pod(link));
        env.add_pod_ipv6(&pods[0]);
        for pod in &pods {
            env.assert_open(pod);
        }
        assert!(reachable(&pods[0].netns, METADATA_V6));
        for hook in TC_HOOKS {
            let agent = env.agent().backend(backend).hooks(&[hook]).config(REJECT).spawn_ready();
            assert_eq!(env.status().on_deny.as_deref(), Some("reject"));
            env.assert_nothing_arrives(|| {
                for pod in &pods {
                    assert!(refused(&pod.netns, METADATA), "TCP at {hook}: {:?}", pod.host_ifname);
                    assert!(prohibited(&pod.netns, METADATA), "UDP at {hook}");
                }
                assert!(refused(&pods[0].netns, METADATA_V6), "TCP over IPv6 at {hook}");
                assert!(prohibited(&pods[0].netns, METADATA_V6), "UDP over IPv6 at {hook}");
            });
            for pod in &pods {
                env.assert_harmless(pod);
            }
            assert!(reachable(&env.node, METADATA) && reachable(&env.node, METADATA_V6));
            drop(agent);

            // An agent with `on_deny = "drop"` sends no reply.
            let agent = env.agent().backend(backend).hooks(&[hook]).config(DROP).spawn_ready();
            assert!(matches!(http_get(&pods[0].netns, METADATA, SHORT), Outcome::Timeout));
            drop(agent);
            env.unload();
            for pod in &pods {
                env.assert_open(pod);
            }
        }
    });
}

#[test]
fn reply_at_node_egress_passes_nat() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let service = Ipv4Addr::new(10, 96, 0, 80);
    let rules = format!(
        "table ip nat {{
            chain prerouting {{ type nat hook prerouting priority -100; ip daddr {service} dnat to {METADATA}; }}
            chain postrouting {{ type nat hook postrouting priority 100; oifname {} masquerade; }}
        }}",
        TestEnv::UPLINK
    );
    let mut nft = env.node.command("nft");
    nft.arg(rules);
    assert!(imds_tests::output(nft).status.success());
    assert!(reachable(&pod.netns, service));
    let agent = env.agent().hooks(&["node_egress"]).config(REJECT).spawn_ready();
    env.assert_nothing_arrives(|| {
        for address in [service, METADATA] {
            assert!(refused(&pod.netns, address), "{address}");
            assert!(prohibited(&pod.netns, address), "{address}");
        }
    });
    drop(agent);
    env.unload();
    assert!(reachable(&pod.netns, service));
}

#[test]
fn earlier_connection_is_reset() {
    for hook in TC_HOOKS {
        let env = TestEnv::new();
        let pod = env.add_pod(PodLink::Routed);
        let mut stream =
            pod.netns.run(|| TcpStream::connect_timeout(&(METADATA, 80).into(), LONG)).expect("open");
        let _agent = env.agent().hooks(&[hook]).config(REJECT).spawn_ready();
        let error = http_exchange(&mut stream, LONG).expect_err("denied");
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{hook}: {error}");
    }
}

#[test]
fn audit_sends_no_reply() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let _agent = env.agent().hooks(&TC_HOOKS).config("mode = 'audit'\non_deny = 'reject'").spawn_ready();
    env.assert_open(&pod);
    assert!(env.status().total.audited.packets > 0);
}

/// Sends a frame from the pod and returns the first received frame that contains `marker`.
fn answer_to(pod: &Pod, frame: &[u8], marker: &[u8]) -> Option<Vec<u8>> {
    let socket = PacketSocket::frames(&pod.netns, Pod::IFNAME);
    socket.send(frame).expect("send");
    socket.find(LONG, |answer| answer[..6] == pod.mac && answer.windows(marker.len()).any(|w| w == marker))
}

#[test]
fn reply_keeps_vlan_tags() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let _agent = env.agent().config(REJECT).spawn_ready();
    let segment = packets::syn(pod.address, METADATA, 40_321, 7);
    let ports = [80_u16.to_be_bytes(), 40_321_u16.to_be_bytes()].concat();
    for tags in [&[(0x8100, 0x6000)][..], &[(0x88a8, 0x6000), (0x8100, 0x4000)]] {
        let frame = packets::tagged_frame(&pod, pod.gateway_mac, tags, &segment);
        let answer = answer_to(&pod, &frame, &ports).expect("an answer");
        // A packet socket returns the outermost tag beside the frame, so that only inner tags remain in it.
        let inner: Vec<u8> = frame[12..].iter().skip(4).copied().take((tags.len() - 1) * 4 + 2).collect();
        assert_eq!(answer[12..12 + inner.len()], inner, "{tags:x?}: {answer:x?}");
    }
}

#[test]
fn flood_limits_replies_and_events() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let _agent = env.agent().config(REJECT).spawn_ready();
    let socket = PacketSocket::frames(&pod.netns, Pod::IFNAME);
    let total = 20_000_u32;
    for sequence in 0..total {
        let segment = packets::syn(pod.address, METADATA, 40_000, sequence);
        loop {
            match socket.send(&packets::frame(&pod, &segment)) {
                Ok(()) => break,
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(error) => panic!("{error}"),
            }
        }
    }
    env.status_when("all are denied", |status| status.denied() >= u64::from(total));
    let answers = received(&pod).expect("the pod's counter");
    assert!(answers >= 1000 && answers < u64::from(total), "{answers} answers");
}

/// Returns the number of packets that the pod's interface received.
fn received(pod: &Pod) -> io::Result<u64> {
    let mut command = pod.netns.command("ip");
    command.args(["-s", "-j", "link", "show", "dev", Pod::IFNAME]);
    let links: serde_json::Value = serde_json::from_slice(&imds_tests::output(command).stdout)?;
    links[0]["stats64"]["rx"]["packets"].as_u64().ok_or_else(|| ErrorKind::InvalidData.into())
}

#[test]
fn macvlan_pod_gets_reply_at_node_egress() {
    if imds_tests::lacks_tc_netns_cookie("replies to macvlan pods") {
        return;
    }
    let env = TestEnv::new();
    let netns = Netns::new("macvlan");
    env.node.ip(&format!(
        "link add mv0 link {} type macvlan mode bridge
         link set mv0 netns {}",
        TestEnv::UPLINK,
        netns.name()
    ));
    netns.ip("link set lo up
         link set mv0 name eth0
         addr add 10.0.0.77/24 dev eth0
         link set eth0 up
         route add default via 10.0.0.1");
    assert!(reachable(&netns, METADATA));
    let agent = env.agent().hooks(&["node_egress"]).config(REJECT).spawn_ready();
    assert!(refused(&netns, METADATA));
    assert!(prohibited(&netns, METADATA));
    drop(agent);
    env.unload();
    assert!(reachable(&netns, METADATA));
}
