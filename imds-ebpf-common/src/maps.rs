//! Layouts of the keys and values of the maps. All integers are in host byte order.

use crate::{Hook, TcHook, Verdict, event::RateLimiter};

/// Version of the map layouts. Increment it with every change of meaning that does not change a size, so that the agent
/// never misreads pinned maps of another version.
pub const MAP_SCHEMA_VERSION: u32 = 12;

/// Effective settings of the programs, which read them only for packets and calls to a protected endpoint.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Policy {
    /// Number of the effective [`Mode`](crate::Mode).
    pub mode: u32,
    /// Number of the effective [`DenyAction`](crate::DenyAction).
    pub on_deny: u32,
    /// The [`MAP_SCHEMA_VERSION`] of the pinned maps; 0 before the first agent has written it.
    pub layout: u32,
    /// Inode number of the node's network namespace, in which the agent runs.
    pub netns: u32,
    /// Enabled hooks: one [`Hook::bit`](crate::Hook::bit) each.
    pub hooks: u32,
    /// Number of the effective [`DenyErrno`](crate::DenyErrno).
    pub on_deny_errno: u32,
    /// Cookie of the node's network namespace (`SO_NETNS_COOKIE`); 0 for the initial one, whose cookie the programs get
    /// from `bpf_get_netns_cookie`.
    pub netns_cookie: u64,
}

/// Key of the map of [`Counter`]s.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct CounterKey {
    /// Index of the interface in the node's network namespace; [`CounterKey::DELETED`] for deleted interfaces and for the
    /// cgroup hooks.
    pub ifindex: u32,
    /// Number of the [`Hook`](crate::Hook) that counts.
    pub hook: u8,
    /// Number of the counted [`Verdict`](crate::Verdict).
    pub verdict: u8,
    /// Explicit padding, always written as 0.
    pub reserved: u16,
}

impl CounterKey {
    /// Index of the counters of all deleted interfaces. The kernel gives no interface the index 0.
    pub const DELETED: u32 = 0;

    /// Creates the key of the packets and calls that got this verdict at `hook` of an interface.
    #[inline(always)]
    #[must_use]
    pub const fn new(ifindex: u32, hook: Hook, verdict: Verdict) -> Self {
        Self { ifindex, hook: hook as u8, verdict: verdict as u8, reserved: 0 }
    }
}

/// Counter of packets and bytes. The map has one value per CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Counter {
    /// Number of packets as the hook sees them: a GSO packet counts once, and so does a call on a socket.
    pub packets: u64,
    /// Bytes of the packets, including the link-layer header; 0 for calls on sockets.
    pub bytes: u64,
    /// Rate limiter of the events, used at `from_pod`, where all packets of an interface have one source.
    pub limiter: RateLimiter,
}

/// Provider whose endpoints are protected, for display. Names are padded with zero bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct ProviderRecord {
    /// Value in the configuration, such as `auto`.
    pub configured: [u8; 16],
    /// Provider of the effective preset, such as `aws`.
    pub effective: [u8; 16],
}

/// Largest size of a configuration as TOML, in bytes.
pub const CONFIG_TEXT_LEN: usize = 64 << 10;
/// Largest length of the path of a configuration file in a record, in bytes.
pub const CONFIG_PATH_LEN: usize = 512;
/// Largest length of an error message in a record, in bytes.
pub const CONFIG_ERROR_LEN: usize = 1024;

/// Effective configuration, for display, and the error of the last rejected one. Text is UTF-8, padded with zero bytes;
/// times are nanoseconds since the epoch.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ConfigRecord {
    /// Generation of the configuration: increases by one with each change, also across restarts of the agent. 0 before the
    /// first.
    pub generation: u64,
    /// Time since which the configuration is effective.
    pub loaded_at: u64,
    /// Time at which a later configuration was rejected; 0 if none was.
    pub failed_at: u64,
    /// Path of the configuration file; empty if there is no file.
    pub path: [u8; CONFIG_PATH_LEN],
    /// Error of the rejected configuration, truncated if longer.
    pub error: [u8; CONFIG_ERROR_LEN],
    /// Exemptions that cannot be applied completely, one line `NAME: REASON` each, truncated if longer.
    pub exemption_errors: [u8; CONFIG_ERROR_LEN],
    /// The configuration as TOML, including all defaults.
    pub text: [u8; CONFIG_TEXT_LEN],
}

/// Size of the name of a pod, a service account or a node (RFC 1123 subdomain) in bytes, including padding.
pub const LONG_NAME_LEN: usize = 256;
/// Size of the name of a namespace or a container (RFC 1123 label) in bytes, including padding.
pub const NAME_LEN: usize = 64;
/// Size of a label in bytes, including padding.
pub const LABEL_LEN: usize = 192;

/// Pod metadata from the API server, keyed by the pod's interface, network namespace or cgroup. Text is padded with zero
/// bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct PodRecord {
    /// Kubernetes namespace of the pod.
    pub namespace: [u8; NAME_LEN],
    /// Name of the pod (`metadata.name`).
    pub name: [u8; LONG_NAME_LEN],
    /// Service account of the pod.
    pub service_account: [u8; LONG_NAME_LEN],
    /// Name of the container, if the key is a container's cgroup; else empty.
    pub container: [u8; NAME_LEN],
    /// Label that identifies the application of the pod, as `key=value`; empty if the pod has none.
    pub label: [u8; LABEL_LEN],
    /// Unique id of the pod (`metadata.uid`).
    pub uid: [u8; NAME_LEN],
}

/// Status of the pod watch. Text is padded with zero bytes; times are nanoseconds since the epoch, and 0 for never.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct KubernetesRecord {
    /// Time at which the watch was established, or interrupted.
    pub since: u64,
    /// Time at which the set of pods was last known to be complete.
    pub synced_at: u64,
    /// Time of the last failed request to the API server.
    pub failed_at: u64,
    /// 1 if the agent watches pods, else 0.
    pub enabled: u32,
    /// 1 while the watch is established, else 0.
    pub connected: u32,
    /// Number of pods on the node, as far as known.
    pub pods: u32,
    /// Number of pods whose sandbox was not found yet.
    pub unresolved: u32,
    /// Number of pods that claim the cgroup of another pod.
    pub disputed: u64,
    /// Name of the node in the cluster.
    pub node: [u8; LONG_NAME_LEN],
    /// Last error, truncated if longer.
    pub error: [u8; CONFIG_ERROR_LEN],
}

/// State of an interface of the node, as the agent has last observed and reconciled it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct InterfaceRecord {
    /// Name, padded with zero bytes.
    pub name: [u8; 16],
    /// Number of the [`Role`] of the interface.
    pub role: u8,
    /// TC hooks that the interface should have: a [`TcHook::bit`] each.
    pub hooks: u8,
    /// The [`AttachMode`] of each hook, in the order of [`TcHook::ALL`].
    pub attach_modes: [u8; 2],
    /// 1 if the agent added the interface's clsact qdisc, else 0.
    pub owns_qdisc: u8,
    /// 1 while an attachment of the interface is in the attach queue, else 0.
    pub pending: u8,
    /// Number of the [`OwnPackets`] of the interface.
    pub own_packets: u8,
    /// 1 if the interface is a port of a bridge, bond or team with a `node_egress` hook, else 0. Copies of one packet for
    /// several ports have no socket, but keep the hash that this hook has set.
    pub sends_copies: u8,
}

/// Packets received on an interface that `node_egress` treats as the node's own.
#[repr(u8)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum OwnPackets {
    /// No packets, as on the interfaces of pods.
    #[default]
    None = 0,
    /// Packets with a socket, which TC redirected to this interface of the node.
    WithSocket = 1,
    /// Packets that another `node_egress` hook has let pass, from a source address of the node or of an exempt pod. They
    /// return from an ifb device, or from a bridge port whose veth peer is also in the node's network namespace.
    Passed = 2,
}

impl InterfaceRecord {
    /// Returns the number of the [`AttachMode`] at a hook.
    #[inline(always)]
    #[must_use]
    pub const fn attach_mode(&self, hook: TcHook) -> u8 {
        let [from_pod, node_egress] = self.attach_modes;
        match hook {
            TcHook::FromPod => from_pod,
            TcHook::NodeEgress => node_egress,
        }
    }

    /// Reports whether a program of the agent is attached at a hook.
    #[inline(always)]
    #[must_use]
    pub const fn is_attached(&self, hook: TcHook) -> bool {
        self.attach_mode(hook) != AttachMode::None as u8
    }

    /// Reports whether a link of the agent is attached at a hook. Its program runs before all qdiscs and filters.
    #[inline(always)]
    #[must_use]
    pub const fn has_link(&self, hook: TcHook) -> bool {
        const TCX: u8 = AttachMode::Tcx as u8;
        const NETKIT: u8 = AttachMode::Netkit as u8;
        matches!(self.attach_mode(hook), TCX | NETKIT)
    }
}

/// Role of an interface on the node, which decides its hooks.
#[repr(u8)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Role {
    /// Any other interface of the node, such as a tunnel, a tap device, or a NIC without a route to a protected endpoint.
    #[default]
    Other = 0,
    /// The host-side interface of a pod, or an interface that the configuration includes.
    Pod = 1,
    /// A route of the node to a protected endpoint leaves through this interface, or through a device on top of it.
    Uplink = 2,
    /// A bridge device of the node.
    Bridge = 3,
    /// The loopback interface of the node.
    Loopback = 4,
    /// An interface that the configuration excludes.
    Excluded = 5,
    /// An ifb device: receives only packets that TC redirects to it, after another hook has given a verdict on them.
    Ifb = 6,
}

impl Role {
    /// Returns the role with this number, or `None` for an unknown number.
    #[must_use]
    pub const fn from_u8(role: u8) -> Option<Self> {
        match role {
            0 => Some(Self::Other),
            1 => Some(Self::Pod),
            2 => Some(Self::Uplink),
            3 => Some(Self::Bridge),
            4 => Some(Self::Loopback),
            5 => Some(Self::Excluded),
            6 => Some(Self::Ifb),
            _ => None,
        }
    }

    /// Returns the name in the output of the agent.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Other => "other",
            Self::Pod => "pod",
            Self::Uplink => "uplink",
            Self::Bridge => "bridge",
            Self::Loopback => "loopback",
            Self::Excluded => "excluded",
            Self::Ifb => "ifb",
        }
    }
}

/// Mechanism by which a program is attached to an interface.
#[repr(u8)]
#[derive(Clone, Copy, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
pub enum AttachMode {
    /// No program of the agent is attached.
    #[default]
    None = 0,
    /// A TCX link (kernel 6.6, commit e420bed02507).
    Tcx = 1,
    /// A direct-action filter on a clsact or ingress qdisc.
    Clsact = 2,
    /// A link at the peer of a netkit device (kernel 6.7, commit 35dfaad7188c).
    Netkit = 3,
}

impl AttachMode {
    /// Returns the name in the output of the agent.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
            Self::Netkit => "netkit",
        }
    }
}

const _: () = assert!(size_of::<Policy>() == 32);
const _: () = assert!(size_of::<CounterKey>() == 8);
const _: () = assert!(size_of::<Counter>() == 56);
const _: () = assert!(size_of::<InterfaceRecord>() == 24);
const _: () = assert!(size_of::<ProviderRecord>() == 32);
const _: () = assert!(size_of::<PodRecord>() == 896);
const _: () = assert!(size_of::<KubernetesRecord>() == 48 + 256 + 1024);
const _: () = assert!(size_of::<ConfigRecord>() == 24 + 512 + 2 * 1024 + 65_536);

#[cfg(feature = "user")]
mod pod {
    use super::{
        ConfigRecord, Counter, CounterKey, InterfaceRecord, KubernetesRecord, PodRecord, Policy,
        ProviderRecord,
    };
    use crate::{
        Address, Endpoint, ExemptionKey, ExemptionRecord, ListenerKey, PolicyFilter, ProbeRecord,
        RedirectRecord, Subject,
    };

    // SAFETY: repr(C), integers only, no padding: every bit pattern is a value.
    unsafe impl aya::Pod for Policy {}
    // SAFETY: repr(C), integers only, no padding: every bit pattern is a value.
    unsafe impl aya::Pod for CounterKey {}
    // SAFETY: repr(C), integers only, no padding: every bit pattern is a value.
    unsafe impl aya::Pod for Counter {}
    // SAFETY: repr(C), integers only, no padding: every bit pattern is a value.
    unsafe impl aya::Pod for InterfaceRecord {}
    // SAFETY: repr(C), integers only, no padding: every bit pattern is a value.
    unsafe impl aya::Pod for ProviderRecord {}
    // SAFETY: repr(C), integers only, no padding: every bit pattern is a value.
    unsafe impl aya::Pod for ConfigRecord {}
    // SAFETY: repr(C), integers only, no padding: every bit pattern is a value.
    unsafe impl aya::Pod for PodRecord {}
    // SAFETY: repr(C), integers only, no padding: every bit pattern is a value.
    unsafe impl aya::Pod for KubernetesRecord {}
    // SAFETY: repr(C), integers only, no padding: every bit pattern is a value.
    unsafe impl aya::Pod for Subject {}
    // SAFETY: repr(C), integers only, no padding: every bit pattern is a value.
    unsafe impl aya::Pod for Address {}
    // SAFETY: repr(C), integers only, no padding: every bit pattern is a value.
    unsafe impl aya::Pod for Endpoint {}
    // SAFETY: repr(C), integers only, no padding: every bit pattern is a value.
    unsafe impl aya::Pod for PolicyFilter {}
    // SAFETY: repr(C), integers only, no padding: every bit pattern is a value.
    unsafe impl aya::Pod for ExemptionKey {}
    // SAFETY: repr(C), integers only, no padding: every bit pattern is a value.
    unsafe impl aya::Pod for ExemptionRecord {}
    // SAFETY: repr(C), integers only, no padding: every bit pattern is a value.
    unsafe impl aya::Pod for ProbeRecord {}
    // SAFETY: repr(C), integers only, no padding: every bit pattern is a value.
    unsafe impl aya::Pod for RedirectRecord {}
    // SAFETY: repr(C), integers only, no padding: every bit pattern is a value.
    unsafe impl aya::Pod for ListenerKey {}
}
