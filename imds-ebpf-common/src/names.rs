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

/// Array of one [`Filter`](crate::Filter).
pub const MAP_FILTER: &str = "imds_filter";
/// Hash of [`Address`](crate::Address) to [`Endpoint`](crate::Endpoint).
pub const MAP_ENDPOINTS: &str = "imds_endpoints";

/// Array of one [`ProviderRecord`](crate::ProviderRecord).
pub const MAP_PROVIDER: &str = "imds_provider";

/// The filter's symbol in the object: a variable rather than a map, so that the programs read it without a lookup.
pub const SYMBOL_FILTER: &str = "IMDS_FILTER";
/// The section of that variable, alone in it, and the name of the map that loaders make of a section.
pub const SECTION_FILTER: &str = ".bss";

/// All programs of the object.
pub const PROGRAMS: [&str; 2] = [PROG_POD_EDGE, PROG_POD_EDGE_L3];
/// All maps of the object.
pub const MAPS: [&str; 6] =
    [MAP_POLICY, MAP_COUNTERS, MAP_INTERFACES, MAP_FILTER, MAP_ENDPOINTS, MAP_PROVIDER];

/// What a map is called in the object.
#[must_use]
pub fn in_object(map: &str) -> &str {
    if map == MAP_FILTER { SECTION_FILTER } else { map }
}

/// Pin of the TCX link of an interface: this, then the decimal interface index.
pub const LINK_POD_EDGE_PREFIX: &str = "pod_edge_";
