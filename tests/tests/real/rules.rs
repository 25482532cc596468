//! Rules of `nft` and `iptables` that rewrite marks and addresses of pods' packets.

use std::net::Ipv4Addr;

use imds_tests::{
    METADATA, PacketSocket, Pod, PodLink, TestEnv, WHOLE_TEST, known_here, lacks_program, packets,
    probe::{SHORT, http_get, udp_echo},
};

use crate::{ALL, PACKETS, assert_exempt, exemption, nft, reaches, run};

const CLUSTER_IP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 80);
/// Mark that Azure NPM v1 sets.
const MARK: &str = "0x1000";

/// Creates a node with an exempt pod and another one.
fn two_pods(link: PodLink) -> (TestEnv, [Pod; 2], String) {
    let env = TestEnv::new();
    let pods = [(); 2].map(|()| env.add_pod(link));
    let config = exemption(&format!("interface = '{}'", pods[0].host_ifname));
    (env, pods, config)
}

#[test]
fn rule_clears_the_mark() {
    if lacks_program(WHOLE_TEST, &["nft"]) {
        return;
    }
    for link in [PodLink::Routed, PodLink::Bridged] {
        let (env, [exempt, other], config) = two_pods(link);
        nft(
            &env.node,
            "table inet later {
                chain forward { type filter hook forward priority 300; meta mark set 0; }
                chain postrouting { type filter hook postrouting priority 300; meta mark set 0; }
            }",
        );
        assert_exempt(&env, &config, Some(&exempt.netns), &[&other.netns]);
    }
}

#[test]
fn rule_replaces_the_mark() {
    if lacks_program(WHOLE_TEST, &["iptables"]) {
        return;
    }
    for link in [PodLink::Routed, PodLink::Bridged] {
        let (env, [exempt, other], config) = two_pods(link);
        run(&env.node, "iptables -t mangle -A FORWARD -j MARK --set-xmark 0xe0000/0xffffffff");
        assert_exempt(&env, &config, Some(&exempt.netns), &[&other.netns]);
    }
}

/// Redirects a Service to the endpoint, and asserts that pods without an exemption do not reach it.
#[track_caller]
fn assert_service_is_denied(env: &TestEnv, config: &str, pods: &[&Pod]) {
    nft(
        &env.node,
        &format!(
            "table ip service {{
                chain prerouting {{
                    type nat hook prerouting priority -100
                    ip daddr {CLUSTER_IP} dnat to {METADATA}
                }}
            }}"
        ),
    );
    let mut vectors = env.vectors(&["node_egress"]).config(config);
    for pod in pods {
        vectors = vectors
            .vector("TCP to the Service", || http_get(&pod.netns, CLUSTER_IP, SHORT).is_answer())
            .vector("UDP to the Service", || udp_echo(&pod.netns, CLUSTER_IP, SHORT).is_answer())
            .vector("TCP", || http_get(&pod.netns, METADATA, SHORT).is_answer());
    }
    vectors.assert_blocked_all();
}

/// Azure NPM v1 marks the packets that its policies accept with this bit.
#[test]
fn rule_sets_the_mark_nft() {
    if lacks_program(WHOLE_TEST, &["nft"]) {
        return;
    }
    for config in [String::new(), exemption("interface = 'elsewhere0'")] {
        let env = TestEnv::new();
        let pods = [PodLink::Routed, PodLink::Bridged].map(|link| env.add_pod(link));
        nft(
            &env.node,
            &format!(
                "table inet npm {{
                    chain forward {{
                        type filter hook forward priority 0
                        meta mark set meta mark or {MARK}
                    }}
                }}"
            ),
        );
        assert_service_is_denied(&env, &config, &pods.each_ref());
    }
}

#[test]
fn rule_sets_the_mark_iptables() {
    if lacks_program(WHOLE_TEST, &["iptables", "nft"]) {
        return;
    }
    let (env, [_exempt, other], config) = two_pods(PodLink::Routed);
    run(&env.node, &format!("iptables -t mangle -A FORWARD -j MARK --set-mark {MARK}/{MARK}"));
    // One pod is exempt, the other one is not.
    assert_service_is_denied(&env, &config, &[&other]);
}

#[test]
fn masquerade_on_the_uplink() {
    if lacks_program(WHOLE_TEST, &["iptables"]) {
        return;
    }
    for link in [PodLink::Routed, PodLink::Bridged] {
        let env = TestEnv::new();
        let [exempt, other] = [env.add_pod(link), env.add_pod(link)];
        let uplink = TestEnv::UPLINK;
        run(&env.node, &format!("iptables -t nat -A POSTROUTING -o {uplink} -j MASQUERADE"));
        let config = exemption(&format!("interface = '{}'", exempt.host_ifname));
        assert_exempt(&env, &config, Some(&exempt.netns), &[&other.netns]);
    }
}

/// An exempt pod that forwards packets, as the node's `ip_forward` permits, gives other pods no access.
#[test]
fn exempt_pod_forwards_for_another() {
    const COUNT: usize = 10;
    for hooks in [ALL, PACKETS] {
        let env = TestEnv::new();
        let exempt = env.add_pod(PodLink::Bridged);
        exempt.netns.sysctl("ipv4/ip_forward", "1");
        let send_from = |pod: &Pod| {
            let packet = packets::udp(pod.address, METADATA, b"forwarded");
            let frame = packets::tagged_frame(pod, exempt.mac, &[], &packet);
            let socket = PacketSocket::frames(&pod.netns, Pod::IFNAME);
            let before = env.received_packets().from(pod.address);
            for _ in 0..COUNT {
                socket.send(&frame).expect("send a frame");
            }
            env.received_packets().from(pod.address) - before
        };
        assert!(reaches(&env, &exempt.netns));
        assert!(send_from(&env.add_pod(PodLink::Bridged)) > 0);

        let config = exemption(&format!("interface = '{}'", exempt.host_ifname));
        let agent = env.agent().config(&config).hooks(&known_here(hooks)).spawn_ready();
        let other = env.add_pod(PodLink::Bridged);
        assert_eq!(send_from(&other), 0, "{hooks:?}, the agent runs");
        agent.kill9();
        // A pod that no agent has seen.
        let unseen = env.add_pod(PodLink::Bridged);
        assert_eq!(send_from(&unseen), 0, "{hooks:?}, no agent runs");
        assert!(reaches(&env, &exempt.netns), "{hooks:?}");
        env.unload();
        assert!(send_from(&unseen) > 0);
    }
}
