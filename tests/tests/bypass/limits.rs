//! Vectors that stay partly open. Each test proves the limit that docs/security.md names, and the remedy.

use std::{
    net::{Ipv4Addr, UdpSocket},
    time::{Duration, Instant},
};

use aya::programs::tc::TcAttachType;
use imds_ebpf_common::PASSED_HASH;
use imds_tests::{
    Agent, METADATA, PacketSocket, Pod, PodLink, SERVICE, Services, TestEnv, WHOLE_TEST,
    foreign_bpf::ForeignProgram,
    hook::run_tc,
    lacks_program, output, packets,
    poll::try_poll,
    probe::{LONG, SHORT, reachable},
    skip, skip_without_netns_cookie,
};

use crate::{
    TC_HOOKS,
    services::{CLUSTER_IP, nft, redirect},
};

const LINKS: [PodLink; 2] = [PodLink::Routed, PodLink::Bridged];

// Connections that are open before enforcement starts.

/// Maximum number of bytes that the service sends without an acknowledgement: 10 segments (RFC 6928) of up to 64 KiB
/// each with segmentation offload.
const MAX_UNACKNOWLEDGED: usize = 10 << 16;

#[test]
fn response_to_an_earlier_request() {
    for (link, hook) in LINKS.into_iter().flat_map(|link| TC_HOOKS.map(|hook| (link, hook))) {
        let env = TestEnv::new();
        let pod = env.add_pod(link);
        let mut connection = env.open_connection(&pod.netns);
        assert!(connection.request(b"long poll", LONG));
        let agent = env.agent().hooks(&[hook]).spawn_ready();
        assert!(connection.respond(b"late response"), "{link:?}, {hook}");
        let start = Instant::now();
        env.assert_nothing_arrives(|| {
            assert!(!connection.request(b"next request", SHORT), "{link:?}, {hook}");
            let received = connection.respond_at_length();
            assert!(received <= MAX_UNACKNOWLEDGED, "{received} bytes, {link:?}, {hook}");
        });
        drop(agent);
        env.unload();
        // The pod retransmits the request, each time after twice as long.
        let deadline = LONG + 2 * start.elapsed();
        assert!(connection.has_arrived(b"next request", deadline), "{link:?}, {hook}");
    }
}

#[test]
fn earlier_connection_with_the_socket_hook_alone() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let mut connection = env.open_connection(&pod.netns);
    let _agent = env.agent().hooks(&["socket"]).spawn_ready();
    assert!(connection.request(b"request", LONG) && connection.respond(b"response"));
}

/// Closes the pod's end with the command in docs/security.md.
#[test]
fn earlier_connection_is_closed_with_ss() {
    if lacks_program(WHOLE_TEST, &["ss"]) {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let mut connection = env.open_connection(&pod.netns);
    assert!(connection.request(b"long poll", LONG));
    let _agent = env.agent().hooks(&TC_HOOKS).spawn_ready();
    let mut command = pod.netns.command("ss");
    command.args(["-K", "dst", &METADATA.to_string()]);
    let killed = String::from_utf8(output(command).stdout).expect("output of ss");
    if !killed.contains(&METADATA.to_string()) {
        skip(WHOLE_TEST, "the kernel can't close sockets of others (CONFIG_INET_DIAG_DESTROY)");
        return;
    }
    assert!(connection.is_aborted());
}

// Responses to an exempt pod that another pod on its bridge diverts.

const RESPONSE: &[u8] = b"credentials";
const BRIDGED_GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 244, 2, 1);
const ROUTED_GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);

/// Builds an ARP request to the gateway with which `sender` claims the address of another pod.
fn arp_claim(sender: &Pod, claimed: Ipv4Addr) -> Vec<u8> {
    const REQUEST: [u8; 10] = [0x08, 0x06, 0, 1, 0x08, 0x00, 6, 4, 0, 1];
    let gateway = match sender.link {
        PodLink::Bridged => BRIDGED_GATEWAY,
        PodLink::Routed | PodLink::Netkit(_) => ROUTED_GATEWAY,
    };
    let parts: [&[u8]; 7] = [
        &sender.gateway_mac,
        &sender.mac,
        &REQUEST,
        &sender.mac,
        &claimed.octets(),
        &[0; 6],
        &gateway.octets(),
    ];
    parts.concat()
}

/// Builds a frame from which a bridge learns the MAC address of another pod at the port of `sender`.
fn mac_claim(sender: &Pod, claimed: [u8; 6]) -> Vec<u8> {
    const EXPERIMENTAL: [u8; 2] = [0x88, 0xb5];
    [&sender.gateway_mac[..], &claimed, &EXPERIMENTAL, &[0; 46]].concat()
}

fn text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// Pods that receive a response to the exempt pod.
#[derive(Debug, Eq, PartialEq)]
enum Receiver {
    Exempt,
    Other,
    Both,
    Neither,
}

/// A node with an exempt pod and another pod.
struct Neighbours {
    env: TestEnv,
    exempt: Pod,
    other: Pod,
}

impl Neighbours {
    fn new(exempt: PodLink, other: PodLink) -> Self {
        let env = TestEnv::new();
        let [exempt, other] = [exempt, other].map(|link| env.add_pod(link));
        // The other pod keeps diverted responses to itself.
        other.netns.sysctl("ipv4/ip_forward", "0");
        assert!(reachable(&exempt.netns, METADATA));
        Self { env, exempt, other }
    }

    #[track_caller]
    fn start(&self) -> Agent<'_> {
        let rule = format!("[[exempt]]\nname = 'reader'\ninterface = '{}'", self.exempt.host_ifname);
        let agent = self.env.agent().hooks(&TC_HOOKS).config(&rule).spawn_ready();
        assert!(reachable(&self.exempt.netns, METADATA), "{}", agent.log());
        agent
    }

    /// Sends a request of the exempt pod, the claim of the other pod, and the response.
    fn receiver(&self, claim: &[u8]) -> Receiver {
        let service = self.env.fabric.run(|| UdpSocket::bind((METADATA, 0))).expect("bind a service");
        let client = self.exempt.netns.run(|| UdpSocket::bind("0.0.0.0:0")).expect("bind a client");
        service.set_read_timeout(Some(LONG)).expect("a timeout");
        client.set_nonblocking(true).expect("a non-blocking socket");
        let other = PacketSocket::frames(&self.other.netns, Pod::IFNAME);
        client.send_to(b"request", service.local_addr().expect("an address")).expect("send a request");
        let (_, sender) = service.recv_from(&mut [0; 16]).expect("the request of the exempt pod");
        other.send(claim).expect("send a claim");
        // Packets wait in the queues of the CPUs: the node must see the claim before the response.
        let _after_the_claim = self.env.received_packets();
        service.send_to(RESPONSE, sender).expect("send a response");
        let mut received = [false; 2];
        let mut receive = |is_enough: fn([bool; 2]) -> bool| {
            received[0] |= client.recv(&mut [0; 16]).is_ok();
            received[1] |= other.sees(RESPONSE, Duration::ZERO);
            is_enough(received).then_some(())
        };
        let _any = try_poll(LONG, || receive(|[client, other]| client || other));
        // The response may reach both pods.
        let _both = try_poll(SHORT, || receive(|[client, other]| client && other));
        match received {
            [true, false] => Receiver::Exempt,
            [false, true] => Receiver::Other,
            [true, true] => Receiver::Both,
            [false, false] => Receiver::Neither,
        }
    }

    /// Asserts that no packet of the other pod with the addresses of the exempt pod arrives at the endpoint.
    #[track_caller]
    fn assert_denied(&self) {
        let packet = packets::udp(self.exempt.address, METADATA, b"forged");
        let mut frame = packets::frame(&self.other, &packet);
        frame[6..12].copy_from_slice(&self.exempt.mac);
        let socket = PacketSocket::frames(&self.other.netns, Pod::IFNAME);
        self.env.assert_nothing_arrives(|| socket.send(&frame).expect("send a frame"));
    }
}

#[test]
fn spoofing_on_the_bridge_of_an_exempt_pod() {
    let pods = Neighbours::new(PodLink::Bridged, PodLink::Bridged);
    let Neighbours { env, exempt, other } = &pods;
    let claims = [arp_claim(other, exempt.address), mac_claim(other, exempt.mac)];
    let assert_receiver = |expected: Receiver, claim: &[u8], case: &str| {
        assert_eq!(pods.receiver(claim), expected, "{case}");
        // Traffic of the exempt pod restores the addresses that the node has learned.
        env.node.ip(&format!("neigh flush dev {}", TestEnv::BRIDGE));
        assert!(reachable(&exempt.netns, SERVICE));
    };
    for claim in &claims {
        assert_receiver(Receiver::Other, claim, "without the agent");
    }
    let agent = pods.start();
    for claim in &claims {
        assert_receiver(Receiver::Other, claim, "with the agent");
        pods.assert_denied();
    }

    // A fixed neighbour entry stops only the ARP claim, and a port without learning only the MAC claim.
    env.node.ip(&format!(
        "neigh replace {} lladdr {} dev {} nud permanent",
        exempt.address,
        text(exempt.mac),
        TestEnv::BRIDGE
    ));
    assert_eq!(pods.receiver(&claims[0]), Receiver::Exempt, "fixed neighbour entry");
    assert_eq!(pods.receiver(&claims[1]), Receiver::Other, "fixed neighbour entry");
    env.node.ip(&format!("link set {} type bridge_slave learning off", other.host_ifname));
    assert!(reachable(&exempt.netns, SERVICE));
    for claim in &claims {
        assert_eq!(pods.receiver(claim), Receiver::Exempt, "no learning");
    }
    drop(agent);
    env.unload();
}

/// Proves the remedy: with a routed link, a route of the node sends responses to the interface of the exempt pod.
#[test]
fn spoofing_of_a_routed_exempt_pod() {
    for link in LINKS {
        let pods = Neighbours::new(PodLink::Routed, link);
        let Neighbours { env, exempt, other } = &pods;
        let agent = pods.start();
        for claim in [arp_claim(other, exempt.address), mac_claim(other, exempt.mac)] {
            assert_eq!(pods.receiver(&claim), Receiver::Exempt, "{link:?}");
            pods.assert_denied();
        }
        drop(agent);
        env.unload();
    }
}

// Requests with the endpoint as their source, whose responses go to the endpoint.

const ECHO_PORT: u16 = 7;

/// Sends a UDP datagram and a TCP SYN packet with the endpoint as their source. Reports for each whether a response of
/// `target` arrives at the endpoint within `deadline`.
fn reflects(env: &TestEnv, pod: &Pod, target: Ipv4Addr, mac: [u8; 6], deadline: Duration) -> [bool; 2] {
    let requests = [
        packets::udp_to_port(METADATA, target, ECHO_PORT, b"reflected"),
        packets::syn(METADATA, target, 40_000, 1),
    ];
    requests.map(|request| {
        let socket = PacketSocket::frames(&pod.netns, Pod::IFNAME);
        let before = env.received_packets().from(target);
        socket.send(&packets::tagged_frame(pod, mac, &[], &request)).expect("send a frame");
        let is_reflected =
            try_poll(deadline, || (env.received_packets().from(target) > before).then_some(()));
        // Frames to the pod start with its MAC address.
        let is_answer = |frame: &[u8]| frame.starts_with(&pod.mac) && frame[12..14] == [0x08, 0x00];
        assert!(socket.find(SHORT, is_answer).is_none(), "a response to the pod");
        is_reflected.is_some()
    })
}

#[test]
fn reflected_requests_return_no_response() {
    const NONE: [bool; 2] = [false; 2];
    const BOTH: [bool; 2] = [true; 2];
    for link in LINKS {
        let env = TestEnv::new();
        let [pod, exempt, other] = [(); 3].map(|()| env.add_pod(link));
        let node = env.node_address();
        let _services = [(&*env.node, node), (&exempt.netns, exempt.address), (&other.netns, other.address)]
            .map(|(netns, address)| Services::start(netns, &[address.into()]));
        let by_node = |target| reflects(&env, &pod, target, pod.gateway_mac, LONG);
        let soon_by_node = |target| reflects(&env, &pod, target, pod.gateway_mac, SHORT);
        assert_eq!(
            [node, exempt.address, other.address].map(by_node),
            [BOTH; 3],
            "without the agent, {link:?}"
        );

        let rule = format!("[[exempt]]\nname = 'reader'\ninterface = '{}'", exempt.host_ifname);
        let agent = env.agent().hooks(&TC_HOOKS).config(&rule).spawn_ready();
        assert_eq!(by_node(node), BOTH, "{link:?}");
        assert_eq!(by_node(exempt.address), BOTH, "{link:?}");
        assert_eq!(soon_by_node(other.address), NONE, "{link:?}");

        // Reverse path filtering is the remedy. A bridge forwards frames from pod to pod without this check.
        env.node.sysctl("ipv4/conf/all/rp_filter", "1");
        assert_eq!([node, exempt.address].map(soon_by_node), [NONE; 2], "{link:?}");
        if link == PodLink::Bridged {
            assert_eq!(reflects(&env, &pod, exempt.address, exempt.mac, LONG), BOTH);
        }
        env.node.sysctl("ipv4/conf/all/rp_filter", "0");
        drop(agent);
        env.unload();
    }
}

// Packet fields that rules and programs of the node write.

/// `node_egress` recognizes exempt pods behind a bridge by a field that no rule writes: rules that set or clear all bits of
/// the mark exempt no other pod, also for requests to which a Service gives the endpoint's address after `from_pod`.
#[test]
fn rules_that_write_marks_change_nothing() {
    if lacks_program(WHOLE_TEST, &["nft"]) {
        return;
    }
    let env = TestEnv::new();
    let [exempt, other] = [(); 2].map(|()| env.add_pod(PodLink::Bridged));
    redirect(&env.node, CLUSTER_IP, METADATA);
    let masquerade = format!("oifname {} masquerade", TestEnv::UPLINK);
    let rules = |mark: &str| {
        format!(
            "table ip rules {{
                chain forward {{ type filter hook forward priority 0; meta mark set {mark}; }}
                chain postrouting {{ type nat hook postrouting priority 100; {masquerade}; }}
            }}"
        )
    };
    let rule = format!("[[exempt]]\nname = 'reader'\ninterface = '{}'", exempt.host_ifname);
    let agent = env.agent().hooks(&["from_pod", "node_egress"]).config(&rule).spawn_ready();
    for mark in ["0", "0xffffffff"] {
        nft(&env.node, &rules(mark));
        assert!(reachable(&exempt.netns, METADATA), "{mark}: {}", agent.log());
        for address in [METADATA, CLUSTER_IP] {
            env.assert_nothing_arrives(|| assert!(!reachable(&other.netns, address), "{mark}, {address}"));
        }
        nft(&env.node, "delete table ip rules");
    }
    drop(agent);
    env.unload();
    assert!(reachable(&other.netns, CLUSTER_IP));
}

/// A program of the node can set the hash of passed packets. The hash alone exempts no pod.
#[test]
fn hash_of_passed_packets_exempts_no_pod() {
    let env = TestEnv::new();
    let exempt = env.add_pod(PodLink::Bridged);
    let pods = [PodLink::Bridged, PodLink::Routed].map(|link| env.add_pod(link));
    let program = ForeignProgram::setting_hash(Some(PASSED_HASH));
    for pod in &pods {
        run_tc(&pod.netns, &["qdisc", "add", "dev", Pod::IFNAME, "clsact"]);
        program.attach_filter(&pod.netns, Pod::IFNAME, TcAttachType::Egress, 1);
        assert!(reachable(&pod.netns, METADATA));
    }
    let rule = format!("[[exempt]]\nname = 'reader'\ninterface = '{}'", exempt.host_ifname);
    for hooks in [&["from_pod"][..], &["node_egress"], &["from_pod", "node_egress"]] {
        let agent = env.agent().hooks(hooks).config(&rule).spawn_ready();
        for pod in &pods {
            env.assert_nothing_arrives(|| {
                assert!(!reachable(&pod.netns, METADATA), "{hooks:?}: {}", agent.log());
            });
        }
        drop(agent);
        env.unload();
    }
    assert!(pods.iter().all(|pod| reachable(&pod.netns, METADATA)));
}
