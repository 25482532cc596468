//! Crafted packets: those that reach the metadata service without the agent do not reach it with the agent.

use std::net::Ipv4Addr;

use imds_ebpf_common::packet::MAX_VLAN_TAGS;
use imds_tests::{
    Agent, METADATA, PacketSocket, Pod, PodLink, SERVICE, TestEnv, packets,
    probe::{LONG, SHORT},
    with_each_backend,
};

use crate::TC_HOOKS;

const LINKS: [PodLink; 2] = [PodLink::Routed, PodLink::Bridged];
/// Address that no host in the topology has.
const STRANGER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 77);

/// Runs a test with each hook that sees packets alone, in each attach mode.
fn with_each_tc_hook(test: impl Fn(&dyn Fn(&TestEnv) -> Agent<'_>)) {
    for hook in TC_HOOKS {
        with_each_backend(|backend| {
            eprintln!("hook: {hook}");
            test(&|env| env.agent().backend(backend).hooks(&[hook]).spawn_ready());
        });
    }
}

fn denied(env: &TestEnv) -> u64 {
    env.status().total.denied.packets
}

/// Returns packets that Linux forwards, with their names.
fn forwarded_packets(source: Ipv4Addr, destination: Ipv4Addr) -> Vec<(String, Vec<u8>)> {
    let mut all = vec![
        ("UDP".into(), packets::udp(source, destination, b"datagram")),
        ("UDP without payload".into(), packets::udp(source, destination, b"")),
        ("TCP SYN".into(), packets::syn(source, destination, 40_000, 1)),
        ("first fragment".into(), packets::fragment(source, destination, 0, true)),
        ("middle fragment".into(), packets::fragment(source, destination, 2, true)),
        ("last fragment".into(), packets::fragment(source, destination, 4, false)),
        ("last fragment at a large offset".into(), packets::fragment(source, destination, 8000, false)),
    ];
    // ICMP, IGMP, IPIP, 6in4, DCCP, GRE, ESP, SCTP, UDP-Lite, experimental and reserved.
    for protocol in [1, 2, 4, 41, 33, 47, 50, 132, 136, 253, 255] {
        all.push((format!("protocol {protocol}"), packets::protocol(source, destination, protocol)));
    }
    let options: [(&str, &[u8]); 4] = [
        ("one no-operation and end", &[1, 0, 0, 0]),
        ("40 no-operations", &[1; 40]),
        ("record route", &[7, 7, 4, 0, 0, 0, 0, 0]),
        ("an unknown option", &[0x1e, 4, 0, 0]),
    ];
    for (name, options) in options {
        all.push((format!("options: {name}"), packets::with_options(source, destination, options)));
    }
    all
}

#[test]
fn every_ip_packet_form_is_denied() {
    with_each_tc_hook(|start| {
        let env = TestEnv::new();
        let pods = LINKS.map(|link| env.add_pod(link));
        let send = |pod: &Pod, packet: &Vec<u8>| {
            PacketSocket::frames(&pod.netns, Pod::IFNAME).send(&packets::frame(pod, packet)).unwrap();
        };
        let assert_open = || {
            for pod in &pods {
                for (name, packet) in forwarded_packets(pod.address, METADATA) {
                    assert!(env.arrives(|| send(pod, &packet)), "{name} does not arrive without the agent");
                }
            }
        };
        assert_open();

        let agent = start(&env);
        let before = env.received_packets();
        for pod in &pods {
            let denied_before = denied(&env);
            let packets = forwarded_packets(pod.address, METADATA);
            for (name, packet) in &packets {
                send(pod, packet);
                assert_eq!(env.received_packets(), before, "{name}");
            }
            assert_eq!(denied(&env) - denied_before, u64::try_from(packets.len()).unwrap());
        }
        drop(agent);
        env.unload();
        assert_open();
    });
}

#[test]
fn spoofed_source_is_denied() {
    with_each_tc_hook(|start| {
        let env = TestEnv::new();
        let [pod, neighbour] = LINKS.map(|link| env.add_pod(link));
        let forged = [env.node_address(), neighbour.address, STRANGER];
        let send_all = || {
            let socket = PacketSocket::frames(&pod.netns, Pod::IFNAME);
            for source in forged {
                let mut frame = packets::frame(&pod, &packets::udp(source, METADATA, b"forged"));
                socket.send(&frame).unwrap();
                // A spoofed MAC address does not help either.
                frame[6..12].copy_from_slice(&[0x02, 0xde, 0xad, 0xbe, 0xef, 0x01]);
                socket.send(&frame).unwrap();
            }
        };
        // Linux drops packets that arrive with one of its own addresses as the source. That one packet would never
        // arrive.
        send_all();
        let received_packets = env.received_packets();
        assert_eq!((received_packets.from(neighbour.address), received_packets.from(STRANGER)), (2, 2));

        let agent = start(&env);
        env.assert_nothing_arrives(send_all);
        // Linux drops the packet with the node's own address before `node_egress`.
        assert!([4, 6].contains(&denied(&env)));
        drop(agent);
        env.unload();
        send_all();
        let received_packets = env.received_packets();
        assert_eq!((received_packets.from(neighbour.address), received_packets.from(STRANGER)), (4, 4));
    });
}

/// Priority tag with VLAN id 0, which Linux treats as no tag.
const PRIORITY_TAG: (u16, u16) = (0x8100, 0x2000);
const PRIORITY_TAG_AD: (u16, u16) = (0x88a8, 0x2000);
/// Number of priority tags that each kernel removes. Debian's 6.12.118 drops frames with more, others remove 20.
const ALWAYS_DELIVERED: usize = 8;

#[test]
fn priority_tags_are_denied() {
    with_each_tc_hook(|start| {
        let env = TestEnv::new();
        let pods = LINKS.map(|link| env.add_pod(link));
        let tags: [&[_]; 8] = [
            &[PRIORITY_TAG],
            &[PRIORITY_TAG_AD],
            &[PRIORITY_TAG_AD, PRIORITY_TAG],
            &[PRIORITY_TAG; 2],
            &[PRIORITY_TAG; 8],
            &[PRIORITY_TAG; 9],
            &[PRIORITY_TAG; 10],
            &[PRIORITY_TAG; 20],
        ];
        let send = |pod: &Pod, tags: &[(u16, u16)]| {
            let packet = packets::udp(pod.address, METADATA, b"tagged");
            let frame = packets::tagged_frame(pod, pod.gateway_mac, tags, &packet);
            PacketSocket::frames(&pod.netns, Pod::IFNAME).send(&frame).unwrap();
        };
        let arrives = |pod: &Pod, tags: &[_]| {
            let before = env.received_packets().from(pod.address);
            send(pod, tags);
            env.received_packets().from(pod.address) == before + 1
        };
        let arrivals = || {
            let of_pod = |pod| tags.map(|tags| (tags.len(), arrives(pod, tags)));
            pods.each_ref().map(of_pod)
        };
        let open = arrivals();
        for (count, arrived) in open.as_flattened() {
            assert!(*arrived || *count > ALWAYS_DELIVERED, "{count} tags without the agent");
        }
        let agent = start(&env);
        for (pod, open) in pods.iter().zip(&open) {
            for (tags, (count, arrived)) in tags.iter().zip(open) {
                let before = denied(&env);
                env.assert_nothing_arrives(|| send(pod, tags));
                // `from_pod` does not count frames with more tags; before it, the kernel removes the first tag.
                if *arrived && *count <= MAX_VLAN_TAGS + 1 {
                    assert_eq!(denied(&env), before + 1, "{tags:x?}");
                }
            }
        }
        drop(agent);
        env.unload();
        assert_eq!(arrivals(), open);
    });
}

#[test]
fn vlan_through_bridge_is_denied() {
    with_each_backend(|backend| {
        let env = TestEnv::new();
        let [pod, port] = [PodLink::Bridged, PodLink::Bridged].map(|link| env.add_pod(link));
        let watcher = PacketSocket::frames(&port.netns, Pod::IFNAME);
        let socket = PacketSocket::frames(&pod.netns, Pod::IFNAME);
        let tags: [&[_]; 2] = [&[(0x8100, 5)], &[(0x88a8, 6), (0x8100, 7)]];
        let send = |marker: &[u8], destination| {
            for tags in tags {
                let packet = packets::udp(pod.address, destination, marker);
                socket.send(&packets::tagged_frame(&pod, port.mac, tags, &packet)).unwrap();
            }
        };
        let sees_both = |marker: &[u8]| (0..tags.len()).all(|_| watcher.sees(marker, LONG));
        send(b"without agent", METADATA);
        assert!(sees_both(b"without agent"));

        let agent = env.start_agent(backend);
        send(b"with agent", METADATA);
        // Sent afterwards, so that the earlier packet would have arrived by now.
        send(b"elsewhere", SERVICE);
        assert!(watcher.sees(b"elsewhere", LONG) && !watcher.sees(b"with agent", SHORT));
        assert_eq!(denied(&env), 2);
        drop(agent);
        env.unload();
        send(b"after unload", METADATA);
        assert!(sees_both(b"after unload"));
    });
}

#[test]
fn fragmented_jumbo_frame_is_denied() {
    with_each_tc_hook(|start| {
        let env = TestEnv::new();
        let pod = env.add_pod(PodLink::Routed);
        env.fabric.ip("link set node0 mtu 9000");
        env.node.ip(&format!("link set {} mtu 9000\nlink set {} mtu 9000", TestEnv::UPLINK, pod.host_ifname));
        pod.netns.ip("link set eth0 mtu 9000");
        let frame = packets::frame(&pod, &packets::udp(pod.address, METADATA, &[0; 8000]));
        let socket = PacketSocket::frames(&pod.netns, Pod::IFNAME);
        // Two cuts: after the Ethernet header, and inside the destination address.
        let send = || [14, 32].into_iter().for_each(|linear| socket.send_scattered(&frame, linear).unwrap());
        send();
        assert_eq!(env.received_packets().from(pod.address), 2);

        let agent = start(&env);
        env.assert_nothing_arrives(send);
        assert_eq!(denied(&env), 2);
        drop(agent);
        env.unload();
        assert!(env.arrives(send));
    });
}
