//! VLAN devices and VLAN-aware bridges on the node, which interpret the tags of pods' frames.

use imds_tests::{
    METADATA, PacketSocket, Pod, PodLink, TestEnv, WHOLE_TEST, lacks_device, packets,
    probe::{SHORT, http_get, udp_echo},
    skip,
};

use crate::{ALL, TC_HOOKS};

/// Stacks VLAN devices at both ends of the pod's link, and routes the pod's traffic through the uppermost ones.
fn stack(env: &TestEnv, pod: &Pod, devices: &[&str]) {
    let (mut node, mut inside) = (pod.host_ifname.clone(), Pod::IFNAME.to_owned());
    for (level, options) in devices.iter().enumerate() {
        let add =
            |below| format!("link add link {below} name tagged{level} {options}\nlink set tagged{level} up");
        env.node.ip(&add(node));
        pod.netns.ip(&add(inside));
        (node, inside) = (format!("tagged{level}"), format!("tagged{level}"));
    }
    env.node.ip(&format!("addr add 172.29.0.1/24 dev {node}"));
    pod.netns.ip(&format!(
        "addr add 172.29.0.2/24 dev {inside}\nroute add {METADATA} via 172.29.0.1 dev {inside}"
    ));
    env.fabric.ip(&format!("route add 172.29.0.0/24 via {}", env.node_address()));
}

fn assert_stack_blocked(name: &str, devices: &[&str]) {
    if lacks_device(WHOLE_TEST, "VLAN", &format!("link lower0 {}", devices[0])) {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    stack(&env, &pod, devices);
    env.vectors(&ALL)
        .vector(format!("TCP with {name}"), || http_get(&pod.netns, METADATA, SHORT).is_answer())
        .vector(format!("UDP with {name}"), || udp_echo(&pod.netns, METADATA, SHORT).is_answer())
        .assert_blocked_all();
}

#[test]
fn vlan_device_on_pod_link() {
    assert_stack_blocked("one tag", &["type vlan id 5"]);
}

#[test]
fn stacked_vlan_devices() {
    assert_stack_blocked("QinQ", &["type vlan proto 802.1ad id 5", "type vlan id 6"]);
}

/// The bridge removes a port's tag when the frame reaches the bridge's own interface.
#[test]
fn vlan_aware_bridge() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Bridged);
    let mut command = env.node.command("ip");
    command.args(["link", "set", TestEnv::BRIDGE, "type", "bridge", "vlan_filtering", "1"]);
    if !imds_tests::output(command).status.success() {
        skip(WHOLE_TEST, "no VLAN-aware bridges on this kernel");
        return;
    }
    // Ports are members of VLAN 1 by default.
    let packet = packets::udp(pod.address, METADATA, b"tagged");
    let frame = packets::tagged_frame(&pod, pod.gateway_mac, &[(0x8100, 1)], &packet);
    env.vectors(&TC_HOOKS)
        .one_vector("a tag of the bridge's VLAN", || {
            PacketSocket::frames(&pod.netns, Pod::IFNAME).send(&frame).unwrap();
        })
        .assert_blocked_all();
}
