//! Names of programs, maps and pins, as `bpftool` shows them.
//!
//! The BPF object names its symbols so too; a test holds both sides together. The kernel keeps 15 bytes of a name
//! (`BPF_OBJ_NAME_LEN`).

use crate::{Frame, Hook, TcHook};

/// TC ingress program for pods' interfaces with an Ethernet header.
pub const PROG_FROM_POD: &str = "imds_from_pod";
/// The same for those without a link layer.
pub const PROG_FROM_POD_L3: &str = "imds_from_podl3";
/// TC egress program for the node's own interfaces with an Ethernet header.
pub const PROG_NODE_EGRESS: &str = "imds_egress";
/// The same for those without a link layer.
pub const PROG_NODE_EGRESS_L3: &str = "imds_egress_l3";
/// cgroup program for connect(2) on IPv4 sockets.
pub const PROG_CONNECT4: &str = "imds_connect4";
/// cgroup program for connect(2) on IPv6 sockets.
pub const PROG_CONNECT6: &str = "imds_connect6";
/// cgroup program for sendmsg(2) and its like on unconnected IPv4 UDP sockets.
pub const PROG_SENDMSG4: &str = "imds_sendmsg4";
/// The same for IPv6.
pub const PROG_SENDMSG6: &str = "imds_sendmsg6";
/// cgroup program for connect(2) on IPv4 sockets of pods in the node's network namespace.
pub const PROG_HOST_CONNECT4: &str = "imds_host_conn4";
/// The same for IPv6.
pub const PROG_HOST_CONNECT6: &str = "imds_host_conn6";
/// cgroup program for sendmsg(2) and its like on unconnected IPv4 UDP sockets of such pods.
pub const PROG_HOST_SENDMSG4: &str = "imds_host_send4";
/// The same for IPv6.
pub const PROG_HOST_SENDMSG6: &str = "imds_host_send6";
/// cgroup program for packets of such pods.
pub const PROG_HOST_EGRESS: &str = "imds_host_out";
/// `cgroup_skb/ingress` program for packets that sockets of the node receive.
pub const PROG_LOCAL_SERVICE: &str = "imds_local_in";

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
/// Hash of [`Exemption`](crate::Exemption) to [`Grant`](crate::Grant).
pub const MAP_EXEMPT: &str = "imds_exempt";
/// Hash of [`Exemption`](crate::Exemption) to `u32`: source addresses that belong to an exempt subject.
pub const MAP_EXEMPT_SOURCES: &str = "imds_exempt_src";
/// Hash of [`Subject`](crate::Subject) to [`ProbeRecord`](crate::ProbeRecord): test senders of `imds-agent verify`.
pub const MAP_PROBES: &str = "imds_probes";
/// Array of one `u32`: number of entries in [`MAP_PROBES`], so that without probes no packet pays for a lookup.
pub const MAP_PROBING: &str = "imds_probing";
/// Array of one [`ProviderRecord`](crate::ProviderRecord).
pub const MAP_PROVIDER: &str = "imds_provider";
/// Array of one [`ConfigRecord`](crate::ConfigRecord).
pub const MAP_CONFIG: &str = "imds_config";

/// Array of one [`CgroupRecord`](crate::CgroupRecord).
pub const MAP_CGROUP: &str = "imds_cgroup";

/// Array of one [`KubernetesRecord`](crate::KubernetesRecord).
pub const MAP_KUBERNETES: &str = "imds_kubernetes";
/// Hash of [`Subject`](crate::Subject) to [`PodRecord`](crate::PodRecord).
pub const MAP_PODS: &str = "imds_pods";

/// Array of the last [`RecentEvent`](crate::ledger::RecentEvent)s, each at its number modulo their count.
pub const MAP_RECENT: &str = "imds_recent";
/// Array of two numbers of events: at [`LAST`](crate::ledger::LAST) and [`SHOWN`](crate::ledger::SHOWN).
pub const MAP_RECENT_HEAD: &str = "imds_recent_at";
/// Hash of [`DenialKey`](crate::ledger::DenialKey) to [`DenialRecord`](crate::ledger::DenialRecord).
pub const MAP_DENIALS: &str = "imds_denials";

/// Ring buffer of [`Event`](crate::Event)s.
pub const MAP_EVENTS: &str = "imds_events";
/// Per-CPU LRU hash of [`Source`](crate::event::Source) to [`Window`](crate::event::Window).
pub const MAP_SOURCES: &str = "imds_sources";

/// Ring buffer of what the programs log of themselves, in aya-log's form and by its name.
pub const MAP_LOGS: &str = "AYA_LOGS";

/// The filter's symbol in the object: a variable rather than a map, so that the programs read it without a lookup.
pub const SYMBOL_FILTER: &str = "IMDS_FILTER";
/// The section of that variable, alone in it, and the name of the map that loaders make of a section.
pub const SECTION_FILTER: &str = ".bss";
/// Global of the object: 1 where TC programs may call `bpf_get_netns_cookie`.
pub const GLOBAL_TC_HAS_COOKIE: &str = "TC_HAS_COOKIE";
/// Global of the object: 1 if programs on packets of a cgroup may call `bpf_get_netns_cookie`.
pub const GLOBAL_CGROUP_HAS_COOKIE: &str = "CGROUP_HAS_COOKIE";
/// Global of the object: 1 if programs on sockets may call `bpf_set_retval`, to choose the error of a denied call.
pub const GLOBAL_HAS_SET_RETVAL: &str = "HAS_SET_RETVAL";

/// The TC programs.
pub const TC_PROGRAMS: [&str; 4] = [PROG_FROM_POD, PROG_FROM_POD_L3, PROG_NODE_EGRESS, PROG_NODE_EGRESS_L3];
/// The programs on the cgroup whose sockets are guarded.
pub const SOCKET_PROGRAMS: [&str; 4] = [PROG_CONNECT4, PROG_CONNECT6, PROG_SENDMSG4, PROG_SENDMSG6];
/// Pins of their links, in the same order.
pub const SOCKET_LINKS: [&str; 4] = ["connect4", "connect6", "sendmsg4", "sendmsg6"];
/// The programs on each of the Kubernetes pods' cgroups.
pub const HOST_PROGRAMS: [&str; 5] =
    [PROG_HOST_CONNECT4, PROG_HOST_CONNECT6, PROG_HOST_SENDMSG4, PROG_HOST_SENDMSG6, PROG_HOST_EGRESS];
/// How the pins of their links begin, in the same order; `_` and the cgroup's decimal id follow.
pub const HOST_LINKS: [&str; 5] =
    ["host_connect4", "host_connect6", "host_sendmsg4", "host_sendmsg6", "host_egress"];
/// Name of the pinned link of [`PROG_LOCAL_SERVICE`].
pub const LOCAL_SERVICE_LINK: &str = "local_service";

/// Returns the programs of a hook.
#[must_use]
pub const fn programs_of(hook: Hook) -> &'static [&'static str] {
    match hook {
        Hook::FromPod => &[PROG_FROM_POD, PROG_FROM_POD_L3],
        Hook::NodeEgress => &[PROG_NODE_EGRESS, PROG_NODE_EGRESS_L3],
        Hook::Socket => &SOCKET_PROGRAMS,
        Hook::HostNetwork => &HOST_PROGRAMS,
        Hook::LocalService => &[PROG_LOCAL_SERVICE],
    }
}

/// Returns the programs of all hooks.
pub fn programs() -> impl Iterator<Item = &'static str> {
    Hook::ALL.into_iter().flat_map(programs_of).copied()
}

/// All maps of the object but those of constants.
pub const MAPS: [&str; 20] = [
    MAP_POLICY,
    MAP_COUNTERS,
    MAP_INTERFACES,
    MAP_FILTER,
    MAP_ENDPOINTS,
    MAP_EXEMPT,
    MAP_EXEMPT_SOURCES,
    MAP_PROBES,
    MAP_PROBING,
    MAP_PROVIDER,
    MAP_CONFIG,
    MAP_CGROUP,
    MAP_KUBERNETES,
    MAP_PODS,
    MAP_RECENT,
    MAP_RECENT_HEAD,
    MAP_DENIALS,
    MAP_EVENTS,
    MAP_SOURCES,
    MAP_LOGS,
];

/// What a map is called in the object.
#[must_use]
pub fn in_object(map: &str) -> &str {
    if map == MAP_FILTER { SECTION_FILTER } else { map }
}

/// How the names of the TC programs begin, as filters have them.
pub const PREFIX: &str = "imds_";

/// How the pin of an interface's TCX link begins; the decimal interface index follows.
#[must_use]
pub const fn link_prefix(edge: TcHook) -> &'static str {
    match edge {
        TcHook::FromPod => "from_pod_",
        TcHook::NodeEgress => "node_egress_",
    }
}

/// The TC program for an edge and for packets that start with `frame` there.
#[must_use]
pub const fn tc_program(edge: TcHook, frame: Frame) -> &'static str {
    match (edge, frame) {
        (TcHook::FromPod, Frame::Ethernet) => PROG_FROM_POD,
        (TcHook::FromPod, Frame::Ip) => PROG_FROM_POD_L3,
        (TcHook::NodeEgress, Frame::Ethernet) => PROG_NODE_EGRESS,
        (TcHook::NodeEgress, Frame::Ip) => PROG_NODE_EGRESS_L3,
    }
}
