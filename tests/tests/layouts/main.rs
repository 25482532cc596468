//! Layouts of a node's interfaces. In each layout pods are denied, while the node and exempt pods are not.
//!
//! | file | layouts |
//! | --- | --- |
//! | `bridges` | NIC as port of a bridge, with the node's address on the bridge or on a veth pair behind it; pods on that bridge; a Service behind a veth pair of the node |
//! | `stacks` | bond, team and VLAN device above the NIC |
//! | `shaping` | egress of the NIC redirected to an ifb |
//! | `veths` | uplinks that are veths and are not in the main IPv4 table: IPv6 only, policy routing, VRF |
//! | `routes` | default routes that come and go |
//! | `shared` | macvlan and ipvlan pods, which share the NIC |
//! | `taps` | taps of virtual machines as ports of the NIC's bridge |
//! | `selection` | NICs that the configuration excludes or includes |
//!
//! A synthetic device above a VF (`net_failover`, netvsc) needs hardware. A bond sends a packet through two devices in
//! the same way: both call `dev_queue_xmit` for the lower device.

mod bridges;
mod fixture;
mod routes;
mod selection;
mod shaping;
mod shared;
mod stacks;
mod taps;
mod veths;
