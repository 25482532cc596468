//! Virtual machines of the node: taps that are ports of the NIC's bridge.

use std::{fs::File, io::Write as _, net::Ipv4Addr};

use imds_tests::{METADATA, Nic, TestEnv, TunMode, open_tun, packets};

use crate::{
    bridges::{BRIDGE, bridge, disable_bridge_netfilter},
    fixture::assert_denied_at_egress,
};

const TAP: &str = "tap0";
const VM_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 77);
const VM_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 0x77];
/// MAC address of the fabric, also as text for `ip`.
const FABRIC_MAC: ([u8; 6], &str) = ([0x02, 0, 0, 0, 0, 0x01], "02:00:00:00:00:01");

/// Writes a datagram to the endpoint to the tap, as the virtual machine sends it.
fn send_from_vm(mut tap: &File) {
    let (fabric_mac, _) = FABRIC_MAC;
    let packet = packets::udp(VM_ADDRESS, METADATA, b"virtual machine");
    let ethertype = libc::ETH_P_IP.to_be_bytes();
    let frame = [&fabric_mac[..], &VM_MAC, &ethertype[2..], &packet].concat();
    tap.write_all(&frame).expect("write a frame to the tap");
}

/// Asserts that frames of the tap are denied. They belong to a socket of the node, because this process opened the tap
/// in the node's network namespace.
#[track_caller]
fn assert_tap_denied(nic: Nic) {
    let env = TestEnv::with_layout(bridge(nic));
    // `br_netfilter` would remove the socket from the frames, which the test needs.
    disable_bridge_netfilter(&env);
    env.fabric.ip(&format!("link set node0 address {}", FABRIC_MAC.1));
    let tap = open_tun(&env.node, TAP, TunMode::Tap);
    env.node.ip(&format!("link set {TAP} master {BRIDGE}\nlink set {TAP} up"));
    assert_denied_at_egress(&env, VM_ADDRESS, METADATA, || {
        let before = env.received_packets().from(VM_ADDRESS);
        send_from_vm(&tap);
        env.received_packets().from(VM_ADDRESS) > before
    });
}

#[test]
fn tap_in_bridge_of_nic() {
    assert_tap_denied(Nic::Macvlan);
}

#[test]
fn tap_in_bridge_of_veth_nic() {
    assert_tap_denied(Nic::Veth);
}
