//! Names of programs, maps and pins, as `bpftool` shows them.
//!
//! The BPF object uses these names for its symbols, and a test compares them. The kernel truncates names to 15 bytes
//! (`BPF_OBJ_NAME_LEN`).

use crate::{Hook, LinkLayer, TcHook};

/// TC ingress program for the host-side interfaces of pods, with an Ethernet header.
pub const PROG_FROM_POD: &str = "imds_from_pod";
/// TC ingress program for the host-side interfaces of pods, without a link layer.
pub const PROG_FROM_POD_L3: &str = "imds_from_podl3";
/// TC egress program for the node's own interfaces with an Ethernet header.
pub const PROG_NODE_EGRESS: &str = "imds_egress";
/// TC egress program for the node's own interfaces without a link layer.
pub const PROG_NODE_EGRESS_L3: &str = "imds_egress_l3";
/// cgroup program for connect(2) on IPv4 sockets.
pub const PROG_CONNECT4: &str = "imds_connect4";
/// cgroup program for connect(2) on IPv6 sockets.
pub const PROG_CONNECT6: &str = "imds_connect6";
/// cgroup program for sendmsg(2), sendmmsg(2) and sendto(2) on unconnected IPv4 UDP sockets.
pub const PROG_SENDMSG4: &str = "imds_sendmsg4";
/// cgroup program for sendmsg(2), sendmmsg(2) and sendto(2) on unconnected IPv6 UDP sockets.
pub const PROG_SENDMSG6: &str = "imds_sendmsg6";
/// cgroup program for getpeername(2) on IPv4 sockets: shows the endpoint instead of the listener of a scoped exemption.
pub const PROG_PEER4: &str = "imds_peer4";
/// IPv6 variant of [`PROG_PEER4`].
pub const PROG_PEER6: &str = "imds_peer6";
/// cgroup program for connect(2) on IPv4 sockets of hostNetwork pods.
pub const PROG_HOST_CONNECT4: &str = "imds_host_conn4";
/// cgroup program for connect(2) on IPv6 sockets of hostNetwork pods.
pub const PROG_HOST_CONNECT6: &str = "imds_host_conn6";
/// cgroup program for sendmsg(2), sendmmsg(2) and sendto(2) on unconnected IPv4 UDP sockets of hostNetwork pods.
pub const PROG_HOST_SENDMSG4: &str = "imds_host_send4";
/// cgroup program for sendmsg(2), sendmmsg(2) and sendto(2) on unconnected IPv6 UDP sockets of hostNetwork pods.
pub const PROG_HOST_SENDMSG6: &str = "imds_host_send6";
/// `cgroup_skb/egress` program for packets of hostNetwork pods.
pub const PROG_HOST_EGRESS: &str = "imds_host_out";
/// `cgroup_skb/ingress` program for packets that sockets of the node receive.
pub const PROG_LOCAL_SERVICE: &str = "imds_local_in";
/// cgroup program for connect(2) on IPv4 sockets of the node's processes.
pub const PROG_NODE_CONNECT4: &str = "imds_node_conn4";
/// IPv6 variant of [`PROG_NODE_CONNECT4`].
pub const PROG_NODE_CONNECT6: &str = "imds_node_conn6";
/// cgroup program for sendmsg(2) and its like on unconnected IPv4 UDP sockets of the node's processes.
pub const PROG_NODE_SENDMSG4: &str = "imds_node_send4";
/// IPv6 variant of [`PROG_NODE_SENDMSG4`].
pub const PROG_NODE_SENDMSG6: &str = "imds_node_send6";
/// `cgroup_skb/egress` program for packets of the node's processes.
pub const PROG_NODE_SKB_EGRESS: &str = "imds_node_out";

/// Array with one entry: the [`Policy`](crate::Policy).
pub const MAP_POLICY: &str = "imds_policy";
/// Per-CPU hash of [`CounterKey`](crate::CounterKey) to [`Counter`](crate::Counter).
pub const MAP_COUNTERS: &str = "imds_counters";
/// Hash of interface index to [`InterfaceRecord`](crate::InterfaceRecord).
pub const MAP_INTERFACES: &str = "imds_interfaces";

/// Array with one entry: the [`PolicyFilter`](crate::PolicyFilter).
pub const MAP_FILTER: &str = "imds_filter";
/// Hash of [`Address`](crate::Address) to [`Endpoint`](crate::Endpoint).
pub const MAP_ENDPOINTS: &str = "imds_endpoints";
/// Hash of [`ExemptionKey`](crate::ExemptionKey) to [`ExemptionRecord`](crate::ExemptionRecord).
pub const MAP_EXEMPT: &str = "imds_exempt";
/// Hash of [`ExemptionKey`](crate::ExemptionKey) to `u32`: source addresses that belong to an exempt subject.
pub const MAP_EXEMPT_SOURCES: &str = "imds_exempt_src";
/// LRU hash of interface index to `u64`: time of the last packet that `from_pod` let pass by an exemption, in nanoseconds of
/// the boot clock.
pub const MAP_EXEMPT_USE: &str = "imds_exempt_use";
/// Hash of [`ExemptionKey`](crate::ExemptionKey) to [`RedirectRecord`](crate::RedirectRecord): listeners of scoped exemptions, by
/// netns cookie and endpoint.
pub const MAP_REDIRECT: &str = "imds_redirect";
/// Hash of [`ListenerKey`](crate::ListenerKey) to [`Address`](crate::Address): the endpoint of each listener in [`MAP_REDIRECT`].
pub const MAP_LISTENERS: &str = "imds_listeners";
/// Hash of [`Subject`](crate::Subject) to [`ProbeRecord`](crate::ProbeRecord): test senders of `imds-agent verify`.
pub const MAP_PROBES: &str = "imds_probes";
/// Array of one `u32`: number of entries in [`MAP_PROBES`]. The programs look up probes only if it is not 0.
pub const MAP_PROBING: &str = "imds_probing";
/// Hash of [`AllowedProcess`](crate::AllowedProcess) to `u32`: the allow list of the node.
pub const MAP_NODE_ALLOW: &str = "imds_node_allow";
/// Array with one entry: the [`ProviderRecord`](crate::ProviderRecord).
pub const MAP_PROVIDER: &str = "imds_provider";
/// Array with one entry: the [`ConfigRecord`](crate::ConfigRecord).
pub const MAP_CONFIG: &str = "imds_config";

/// Array with one entry: the [`CgroupRecord`](crate::CgroupRecord).
pub const MAP_CGROUP: &str = "imds_cgroup";

/// Array with [`PROGRAM_COUNT`] error numbers: the one with which the kernel rejected each program, in the order of
/// [`programs`], or 0.
pub const MAP_REJECTED: &str = "imds_rejected";

/// Array with one entry: the [`KubernetesRecord`](crate::KubernetesRecord).
pub const MAP_KUBERNETES: &str = "imds_kubernetes";
/// Hash of [`Subject`](crate::Subject) to [`PodRecord`](crate::PodRecord).
pub const MAP_PODS: &str = "imds_pods";

/// Array of the last [`RecentEvent`](crate::event_log::RecentEvent)s, used as a ring: the index is the number modulo the size.
pub const MAP_RECENT: &str = "imds_recent";
/// Array of two event numbers, at the indices [`WRITE_POS`](crate::event_log::WRITE_POS) and
/// [`READ_POS`](crate::event_log::READ_POS).
pub const MAP_RECENT_IDX: &str = "imds_recent_idx";
/// Hash of [`DenialKey`](crate::event_log::DenialKey) to [`DenialRecord`](crate::event_log::DenialRecord).
pub const MAP_DENIALS: &str = "imds_denials";

/// Ring buffer of [`Event`](crate::Event)s, written by the programs.
pub const MAP_EVENTS: &str = "imds_events";
/// Ring buffer of [`RequestStart`](crate::RequestStart)s, written by the programs.
pub const MAP_REQUEST_STARTS: &str = "imds_req_starts";
/// Per-CPU LRU hash of [`RateLimitKey`](crate::event::RateLimitKey) to [`RateLimiter`](crate::event::RateLimiter).
pub const MAP_RATELIMIT: &str = "imds_ratelimit";

/// Ring buffer of log records of the programs. aya-log requires this name.
pub const MAP_LOGS: &str = "AYA_LOGS";

/// Symbol of the filter in the object: a global variable, so that the programs read it without a map lookup.
pub const SYMBOL_FILTER: &str = "IMDS_FILTER";
/// Section that contains only the filter. Loaders create a map of the same name for it.
pub const SECTION_FILTER: &str = ".bss";
/// Global of the object: 1 if TC programs may call `bpf_get_netns_cookie`.
pub const GLOBAL_TC_HAS_COOKIE: &str = "TC_HAS_COOKIE";
/// Global of the object: 1 if `cgroup_skb` programs may call `bpf_get_netns_cookie`.
pub const GLOBAL_CGROUP_HAS_COOKIE: &str = "CGROUP_HAS_COOKIE";
/// Global of the object: 1 if `connect` and `sendmsg` programs may call `bpf_set_retval`, to set the error of a denied call.
pub const GLOBAL_HAS_SET_RETVAL: &str = "HAS_SET_RETVAL";

/// Names of all TC programs.
pub const TC_PROGRAMS: [&str; 4] = [PROG_FROM_POD, PROG_FROM_POD_L3, PROG_NODE_EGRESS, PROG_NODE_EGRESS_L3];
/// Programs of the `socket` hook.
pub const SOCKET_PROGRAMS: [&str; 6] =
    [PROG_CONNECT4, PROG_CONNECT6, PROG_SENDMSG4, PROG_SENDMSG6, PROG_PEER4, PROG_PEER6];
/// Names of the pinned links of [`SOCKET_PROGRAMS`], in this order.
pub const SOCKET_LINKS: [&str; 6] =
    ["connect4", "connect6", "sendmsg4", "sendmsg6", "getpeername4", "getpeername6"];
/// Programs of the `host_network` hook, attached to each cgroup of Kubernetes pods.
pub const HOST_PROGRAMS: [&str; 5] =
    [PROG_HOST_CONNECT4, PROG_HOST_CONNECT6, PROG_HOST_SENDMSG4, PROG_HOST_SENDMSG6, PROG_HOST_EGRESS];
/// Prefixes of the names of the pinned links of [`HOST_PROGRAMS`], in this order. `_` and the decimal cgroup id follow.
pub const HOST_LINKS: [&str; 5] =
    ["host_connect4", "host_connect6", "host_sendmsg4", "host_sendmsg6", "host_egress"];
/// Programs of the `node_allow` hook, on the root of the cgroup hierarchy.
pub const NODE_PROGRAMS: [&str; 5] =
    [PROG_NODE_CONNECT4, PROG_NODE_CONNECT6, PROG_NODE_SENDMSG4, PROG_NODE_SENDMSG6, PROG_NODE_SKB_EGRESS];
/// Names of the pinned links of [`NODE_PROGRAMS`], in the same order.
pub const NODE_LINKS: [&str; 5] =
    ["node_connect4", "node_connect6", "node_sendmsg4", "node_sendmsg6", "node_skb_egress"];
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
        Hook::NodeAllow => &NODE_PROGRAMS,
    }
}

/// Number of the programs of all hooks.
pub const PROGRAM_COUNT: usize = TC_PROGRAMS.len()
    + SOCKET_PROGRAMS.len()
    + HOST_PROGRAMS.len()
    + NODE_PROGRAMS.len()
    + programs_of(Hook::LocalService).len();

/// Returns the programs of all hooks.
pub fn programs() -> impl Iterator<Item = &'static str> {
    Hook::ALL.into_iter().flat_map(programs_of).copied()
}

/// All maps of the object, except the section of its constants.
pub const MAPS: [&str; 26] = [
    MAP_POLICY,
    MAP_COUNTERS,
    MAP_INTERFACES,
    MAP_FILTER,
    MAP_ENDPOINTS,
    MAP_EXEMPT,
    MAP_EXEMPT_SOURCES,
    MAP_EXEMPT_USE,
    MAP_REDIRECT,
    MAP_LISTENERS,
    MAP_PROBES,
    MAP_PROBING,
    MAP_NODE_ALLOW,
    MAP_PROVIDER,
    MAP_CONFIG,
    MAP_CGROUP,
    MAP_REJECTED,
    MAP_KUBERNETES,
    MAP_PODS,
    MAP_RECENT,
    MAP_RECENT_IDX,
    MAP_DENIALS,
    MAP_EVENTS,
    MAP_REQUEST_STARTS,
    MAP_RATELIMIT,
    MAP_LOGS,
];

/// Returns the name of a map in the object: the section for [`MAP_FILTER`].
#[must_use]
pub fn in_object(map: &str) -> &str {
    if map == MAP_FILTER { SECTION_FILTER } else { map }
}

/// Prefix of the names of the TC programs, by which the agent recognizes its TC filters.
pub const PREFIX: &str = "imds_";

/// Returns the prefix of the pin name of an interface's TCX link. The decimal interface index follows.
#[must_use]
pub const fn link_prefix(hook: TcHook) -> &'static str {
    match hook {
        TcHook::FromPod => "from_pod_",
        TcHook::NodeEgress => "node_egress_",
    }
}

/// Returns the name of the TC program for a hook and for interfaces with this link layer.
#[must_use]
pub const fn tc_program(hook: TcHook, link_layer: LinkLayer) -> &'static str {
    match (hook, link_layer) {
        (TcHook::FromPod, LinkLayer::Ethernet) => PROG_FROM_POD,
        (TcHook::FromPod, LinkLayer::None) => PROG_FROM_POD_L3,
        (TcHook::NodeEgress, LinkLayer::Ethernet) => PROG_NODE_EGRESS,
        (TcHook::NodeEgress, LinkLayer::None) => PROG_NODE_EGRESS_L3,
    }
}
