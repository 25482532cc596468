//! Names of programs, maps and pins, as `bpftool` shows them.
//!
//! The BPF object names its symbols so too; a test holds both sides together. The kernel keeps 15 bytes of a name
//! (`BPF_OBJ_NAME_LEN`).

/// TC ingress program for interfaces with an Ethernet header.
pub const PROG_POD_EDGE: &str = "imds_pod_edge";
/// TC ingress program for interfaces without a link layer.
pub const PROG_POD_EDGE_L3: &str = "imds_pod_edgel3";

/// Array of one [`Policy`](crate::Policy).
pub const MAP_POLICY: &str = "imds_policy";
/// Per-CPU hash of [`CounterKey`](crate::CounterKey) to [`Counter`](crate::Counter).
pub const MAP_COUNTERS: &str = "imds_counters";
/// Hash of interface index to [`InterfaceRecord`](crate::InterfaceRecord).
pub const MAP_INTERFACES: &str = "imds_interfaces";

/// All programs of the object.
pub const PROGRAMS: [&str; 2] = [PROG_POD_EDGE, PROG_POD_EDGE_L3];
/// All maps of the object.
pub const MAPS: [&str; 3] = [MAP_POLICY, MAP_COUNTERS, MAP_INTERFACES];

/// Pin of the TCX link of an interface: this, then the decimal interface index.
pub const LINK_POD_EDGE_PREFIX: &str = "pod_edge_";
