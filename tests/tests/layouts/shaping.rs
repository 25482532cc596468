//! Egress of the NIC that is redirected to an ifb and returns to the NIC.

use std::{net::UdpSocket, thread, time::Duration};

use imds_tests::{
    Layout, METADATA, Netns, Nic, StopFlag, TestEnv, WHOLE_TEST, lacks_device, output, probe::LONG, skip,
};

use crate::fixture::Case;

fn layout(nic: Nic) -> Layout {
    Layout::new(nic).above("link add ifb0 type ifb\nlink set ifb0 up", TestEnv::UPLINK)
}

fn tc(netns: &Netns, arguments: &str) -> bool {
    let mut command = netns.command("tc");
    command.args(arguments.split_whitespace());
    output(command).status.success()
}

/// Redirects egress of the NIC with a filter of `qdisc`, which is added to the NIC. `parent` is the filter's parent. Returns
/// false if the kernel lacks the qdisc or filter.
fn redirect(env: &TestEnv, qdisc: &str, parent: &str) -> bool {
    let uplink = TestEnv::UPLINK;
    let redirect = format!(
        "filter add dev {uplink} {parent} protocol all prio 10 u32 match u32 0 0 action mirred egress redirect dev ifb0"
    );
    let is_redirected = tc(&env.node, &format!("qdisc add dev {uplink} {qdisc}")) && tc(&env.node, &redirect);
    if !is_redirected {
        skip(WHOLE_TEST, "no such qdisc, filter or action on this kernel");
    }
    is_redirected
}

fn assert_redirected(nic: Nic, qdisc: &str, parent: &str) {
    if lacks_device(WHOLE_TEST, "ifb", "type ifb") {
        return;
    }
    let case = Case::new(layout(nic));
    if redirect(&case.env, qdisc, parent) {
        case.assert_enforced();
    }
}

/// Packets that are sent at once.
const BURST: usize = 4;
/// Packets without an answer that the buffers of sockets and devices certainly hold, also while the server waits for a CPU.
const MAX_UNANSWERED: usize = 64;

/// Sends bursts of packets to the endpoint until `stop`, one in a millisecond, and returns the number of lost packets. Pauses
/// while too many have no answer.
fn count_lost(stop: &StopFlag) -> usize {
    let socket = UdpSocket::bind("0.0.0.0:0").expect("a socket");
    socket.connect((METADATA, 7)).expect("a route to the endpoint");
    socket.set_read_timeout(Some(Duration::from_millis(1))).expect("a timeout");
    let (mut sent, mut received, mut buffer) = (0, 0, [0; 16]);
    while !stop.is_set() {
        if sent - received < MAX_UNANSWERED {
            sent += (0..BURST).filter(|_| socket.send(b"echo").is_ok()).count();
        }
        received += (0..BURST).take_while(|_| socket.recv(&mut buffer).is_ok()).count();
    }
    socket.set_read_timeout(Some(LONG)).expect("a timeout");
    while received < sent && socket.recv(&mut buffer).is_ok() {
        received += 1;
    }
    assert!(received > 0);
    sent - received
}

/// The agent recognizes packets that return from the ifb as soon as its first program is attached.
#[test]
fn start_denies_no_packet_of_the_node() {
    if lacks_device(WHOLE_TEST, "ifb", "type ifb") {
        return;
    }
    let env = TestEnv::with_layout(layout(Nic::Macvlan));
    if !redirect(&env, "root handle 1: htb", "parent 1:") {
        return;
    }
    let stop = StopFlag::default();
    let lost = thread::scope(|scope| {
        let lost = scope.spawn(|| env.node.run(|| count_lost(&stop)));
        let stop_on_drop = stop.set_on_drop();
        let agent = env.agent().hooks(&["from_pod", "node_egress"]).spawn_ready();
        drop((stop_on_drop, agent));
        lost.join().expect("no panic")
    });
    // A burst may be in the ifb when the program is attached.
    assert!(lost <= BURST, "{lost} packets");
    env.unload();
}

#[test]
fn redirect_of_root_qdisc() {
    assert_redirected(Nic::Macvlan, "root handle 1: htb", "parent 1:");
}

#[test]
fn redirect_of_veth_nic() {
    assert_redirected(Nic::Veth, "root handle 1: htb", "parent 1:");
}

/// In TCX mode the agent's programs run before the redirect, in clsact mode they share its qdisc.
#[test]
fn redirect_of_clsact() {
    assert_redirected(Nic::Macvlan, "clsact", "egress");
}
