//! Bonds and VLAN devices above the NIC.

use imds_tests::{Layout, Nic, TestEnv, WHOLE_TEST, lacks_device, skip_without_team};

use crate::{bridges::BRIDGE, fixture::Case};

fn bond(nic: Nic) -> Layout {
    let setup = format!(
        "link add bond0 type bond mode active-backup miimon 100\nlink set {} master bond0",
        TestEnv::UPLINK
    );
    Layout::new(nic).above(&setup, "bond0")
}

fn lacks_bond() -> bool {
    lacks_device(WHOLE_TEST, "bond", "type bond mode active-backup")
}

#[test]
fn bond_of_nic() {
    if !lacks_bond() {
        Case::new(bond(Nic::Macvlan)).assert_enforced();
    }
}

#[test]
fn bond_of_veth_nic() {
    if !lacks_bond() {
        Case::new(bond(Nic::Veth)).assert_enforced();
    }
}

#[test]
fn team_of_nic() {
    if !skip_without_team() {
        Case::new(Layout::new(Nic::Macvlan).in_team()).assert_enforced();
    }
}

#[test]
fn team_of_veth_nic() {
    if !skip_without_team() {
        Case::new(Layout::new(Nic::Veth).in_team()).assert_enforced();
    }
}

/// Adds a VLAN device above `lower` on the node, and its counterpart in the fabric.
fn vlan(layout: Layout, setup: &str, lower: &str) -> Layout {
    let setup = format!("{setup}\nlink add link {lower} name vlan5 type vlan id 5");
    layout.above(&setup, "vlan5").fabric_above("link add link node0 name vlan5 type vlan id 5", "vlan5")
}

fn lacks_vlan() -> bool {
    lacks_device(WHOLE_TEST, "VLAN", "link lower0 type vlan id 5")
}

#[test]
fn vlan_on_nic() {
    if !lacks_vlan() {
        Case::new(vlan(Layout::new(Nic::Macvlan), "", TestEnv::UPLINK)).assert_enforced();
    }
}

#[test]
fn vlan_on_veth_nic() {
    if !lacks_vlan() {
        Case::new(vlan(Layout::new(Nic::Veth), "", TestEnv::UPLINK)).assert_enforced();
    }
}

/// Four stacked devices, each with TC egress.
#[test]
fn vlan_on_bond_in_bridge() {
    if lacks_vlan() || lacks_bond() {
        return;
    }
    let setup = format!(
        "link add bond0 type bond mode active-backup miimon 100
         link set {} master bond0
         link set bond0 up
         link add link bond0 name vlan5 type vlan id 5
         link set vlan5 up
         link add {BRIDGE} type bridge
         link set vlan5 master {BRIDGE}",
        TestEnv::UPLINK
    );
    let layout = Layout::new(Nic::Veth)
        .above(&setup, BRIDGE)
        .fabric_above("link add link node0 name vlan5 type vlan id 5", "vlan5");
    Case::new(layout).assert_enforced();
}
