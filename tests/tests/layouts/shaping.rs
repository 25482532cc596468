//! Egress of the NIC that is redirected to an ifb and returns to the NIC.

use imds_tests::{Layout, Netns, Nic, TestEnv, WHOLE_TEST, lacks_device, output, skip};

use crate::fixture::Case;

fn layout(nic: Nic) -> Layout {
    Layout::new(nic).above("link add ifb0 type ifb\nlink set ifb0 up", TestEnv::UPLINK)
}

fn tc(netns: &Netns, arguments: &str) -> bool {
    let mut command = netns.command("tc");
    command.args(arguments.split_whitespace());
    output(command).status.success()
}

/// Redirects egress of the NIC with a filter of `qdisc`, which is added to the NIC. `parent` is the filter's parent.
fn assert_redirected(nic: Nic, qdisc: &str, parent: &str) {
    if lacks_device(WHOLE_TEST, "ifb", "type ifb") {
        return;
    }
    let (case, uplink) = (Case::new(layout(nic)), TestEnv::UPLINK);
    let node = &case.env.node;
    let redirect = format!(
        "filter add dev {uplink} {parent} protocol all prio 10 u32 match u32 0 0 action mirred egress redirect dev ifb0"
    );
    if !tc(node, &format!("qdisc add dev {uplink} {qdisc}")) || !tc(node, &redirect) {
        skip(WHOLE_TEST, "no such qdisc, filter or action on this kernel");
        return;
    }
    case.assert_enforced();
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
