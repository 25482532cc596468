//! IPv6 fragments that connection tracking on the node reassembles and then fragments again.

use std::{
    net::{Ipv6Addr, UdpSocket},
    sync::atomic::{AtomicU8, Ordering},
};

use imds_tests::{
    METADATA_V6, Pod, PodLink, TestEnv, packets,
    probe::{LONG, SHORT},
};

use crate::{
    AWS, TC_HOOKS,
    ipv6::{FRAGMENT, UDP, send},
    services::{CLUSTER_IP_V6, nft, redirect},
};

/// Creates an environment whose node tracks connections, as with any Service, and a pod with an IPv6 address.
fn env_with_conntrack() -> (TestEnv, Pod, Ipv6Addr) {
    let env = TestEnv::new().with_ipv6();
    let pod = env.add_pod(PodLink::Routed);
    let address = env.add_pod_ipv6(&pod);
    nft(
        &env.node,
        "table ip6 tracking {
            chain forward { type filter hook forward priority 0; ct state invalid counter accept; }
        }",
    );
    (env, pod, address)
}

/// Sends a UDP datagram in fragments of these sizes. All but the last must be multiples of 8.
fn send_fragments(pod: &Pod, source: Ipv6Addr, sizes: &[usize]) {
    static IDENTIFICATION: AtomicU8 = AtomicU8::new(0);
    let identification = IDENTIFICATION.fetch_add(1, Ordering::Relaxed);
    let length: usize = sizes.iter().sum();
    // Source port 40000, destination port 9999.
    let mut datagram = vec![0x9c, 0x40, 0x27, 0x0f];
    datagram.extend_from_slice(&u16::try_from(length).unwrap().to_be_bytes());
    datagram.extend_from_slice(&[0, 1]);
    datagram.resize(length, 0);
    let mut offset = 0;
    for size in sizes {
        let place = u16::try_from(offset).unwrap() | u16::from(offset + size < length);
        let header = [&[UDP, 0][..], &place.to_be_bytes(), &[0, 0, 0x1b, identification]].concat();
        let content = [&header[..], &datagram[offset..offset + size]].concat();
        send(pod, &packets::ipv6(source, METADATA_V6, FRAGMENT, &content));
        offset += size;
    }
}

#[test]
fn fragments_reassembled_by_the_node() {
    let (env, pod, address) = env_with_conntrack();
    let send = |sizes| send_fragments(&pod, address, sizes);
    env.vectors(&TC_HOOKS)
        .config(AWS)
        .one_vector("two fragments", || send(&[1232, 100]))
        .one_vector("fragments with the smallest one first", || send(&[104, 1232, 64]))
        .one_vector("many small fragments", || send(&[64; 40]))
        .assert_blocked_all();
}

/// Tests fragments that lose their ingress interface. If the uplink needs more headroom than the fragments have, as
/// with `hv_netvsc` and tunnels, IPv6 output copies them to new packets without the ingress interface
/// (`ip6_copy_metadata`).
fn assert_refragmented_blocked(hooks: &[&'static str], destination: Ipv6Addr) {
    let (env, pod, _) = env_with_conntrack();
    redirect(&env.node, CLUSTER_IP_V6, METADATA_V6);
    // The headroom that a bridge port needs also applies to the peer of a veth.
    env.fabric.ip("link add br0 type bridge
         link add vx0 type vxlan id 9 dstport 4790
         link set vx0 master br0
         link set node0 master br0
         link set br0 up");
    // The bridge took over the interface of the address, on which neighbour discovery gets no reply any more.
    let neighbour = "neigh replace fd10::1 lladdr 02:00:00:00:00:01 nud permanent dev";
    env.node.ip(&format!("{neighbour} {}", TestEnv::UPLINK));
    let fabric = env.fabric_frames();
    let arrives = |marker: &str, timeout| {
        let mut datagram = marker.as_bytes().to_vec();
        datagram.resize(1600, 0);
        let socket = pod.netns.run(|| UdpSocket::bind("[::]:0")).unwrap();
        socket.send_to(&datagram, (destination, 9999)).unwrap();
        fabric.sees(marker.as_bytes(), timeout)
    };
    assert!(arrives("without an agent", LONG));
    let agent = env.agent().hooks(hooks).config(AWS).spawn_ready();
    assert!(!arrives("with the agent", SHORT));
    drop(agent);
    env.unload();
    assert!(arrives("after unload", LONG));
}

#[test]
fn refragmented_denied_at_from_pod() {
    assert_refragmented_blocked(&["from_pod"], METADATA_V6);
}

#[test]
fn refragmented_denied_at_node_egress() {
    assert_refragmented_blocked(&["node_egress"], METADATA_V6);
}

#[test]
fn refragmented_to_service_is_denied() {
    assert_refragmented_blocked(&TC_HOOKS, CLUSTER_IP_V6);
}
