//! Layout of the maps' keys and values. All integers are in host byte order.

use crate::{Hook, TcHook, Verdict, event::Window};

/// Number of the layout below. It changes with every change of meaning that the sizes do not show, so that a newer
/// agent never reads an older one's maps for something else.
pub const LAYOUT: u32 = 7;

/// What is in force, read by the programs for packets to a guarded endpoint only.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Policy {
    /// A [`Mode`](crate::Mode).
    pub mode: u32,
    /// An [`DenyAction`](crate::DenyAction).
    pub on_deny: u32,
    /// The [`LAYOUT`] with which the maps were written; 0 before the first agent wrote it.
    pub layout: u32,
    /// Inode number of the node's network namespace: the one in which the agent runs.
    pub netns: u32,
    /// The hooks that are on: a [`Hook::bit`](crate::Hook::bit) each.
    pub hooks: u32,
    /// Bit of the packet mark that `from_pod` sets for `node_egress` on packets of exempt pods behind a bridge; 0 for none.
    pub mark: u32,
    /// A [`DenyErrno`](crate::DenyErrno).
    pub on_deny_errno: u32,
    /// Zero.
    pub reserved: u32,
    /// Cookie of the node's network namespace (`SO_NETNS_COOKIE`); 0 for the initial one, whose cookie the programs
    /// can ask for themselves.
    pub netns_cookie: u64,
}

/// The bit that is [`Policy::mark`]: none that kube-proxy, Cilium, Calico, the AWS CNI or Istio use.
pub const MARK: u32 = 1 << 12;

/// What a [`Counter`] counts.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct CounterKey {
    /// Index of the interface in the node's network namespace; [`CounterKey::DEPARTED`] for those that are gone, and
    /// for what is judged by cgroup.
    pub ifindex: u32,
    /// A [`Hook`](crate::Hook).
    pub hook: u8,
    /// A [`Verdict`](crate::Verdict).
    pub verdict: u8,
    /// Zero.
    pub reserved: u16,
}

impl CounterKey {
    /// Stands for all interfaces that no longer exist. The kernel gives no interface the index 0.
    pub const DEPARTED: u32 = 0;

    /// The key for what `hook` on this interface judged so.
    #[inline(always)]
    #[must_use]
    pub const fn new(ifindex: u32, hook: Hook, verdict: Verdict) -> Self {
        Self { ifindex, hook: hook as u8, verdict: verdict as u8, reserved: 0 }
    }
}

/// Packets and bytes, one per CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Counter {
    /// Packets as the hook sees them: a GSO super-packet is one, and so is a call on a socket.
    pub packets: u64,
    /// Bytes of these packets, link-layer header included; none of calls on sockets.
    pub bytes: u64,
    /// Rate limit of the events of these packets, used at `from_pod`, where all of them have one source.
    pub window: Window,
}

/// Where the endpoints come from, for people to read. Names are padded with zero bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct ProviderRecord {
    /// What the configuration says, such as `auto`.
    pub configured: [u8; 16],
    /// Whose preset is in force, such as `aws`.
    pub in_force: [u8; 16],
}

/// Most bytes of a configuration.
pub const CONFIG_TEXT_LEN: usize = 64 << 10;
/// Most bytes of the path of a configuration file that are kept.
pub const CONFIG_PATH_LEN: usize = 512;
/// Most bytes that are kept of what was wrong with a configuration file.
pub const CONFIG_ERROR_LEN: usize = 1024;

/// The configuration in force, for people to read, and what became of the last one that was tried. Text is UTF-8, padded
/// with zero bytes; times are nanoseconds since the epoch.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ConfigRecord {
    /// Number of the configuration: one more with each that comes into force, across agents. 0 before the first.
    pub generation: u64,
    /// When it came into force.
    pub loaded_at: u64,
    /// When a later one was refused; 0 where none was.
    pub failed_at: u64,
    /// The file it is from; empty where there is none.
    pub path: [u8; CONFIG_PATH_LEN],
    /// Why the later one was refused, cut where it is longer.
    pub error: [u8; CONFIG_ERROR_LEN],
    /// The configuration as TOML, every default included.
    pub text: [u8; CONFIG_TEXT_LEN],
}

/// Most bytes of the name of a pod, a service account or a node (RFC 1123 subdomain), with the zeros behind it.
pub const LONG_NAME_LEN: usize = 256;
/// The same of a namespace or a container (RFC 1123 label).
pub const NAME_LEN: usize = 64;
/// Most bytes of a label of which a record tells.
pub const LABEL_LEN: usize = 192;

/// The pod that is behind an interface, a network namespace or a cgroup, as the API server describes it. Text is padded
/// with zero bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct PodRecord {
    /// Its namespace.
    pub namespace: [u8; NAME_LEN],
    /// Its name.
    pub name: [u8; LONG_NAME_LEN],
    /// Its service account.
    pub service_account: [u8; LONG_NAME_LEN],
    /// The container whose cgroup it is; empty for all that is not one's.
    pub container: [u8; NAME_LEN],
    /// A label that says what it runs, as `key=value`; empty where none does.
    pub label: [u8; LABEL_LEN],
    /// Its id, which no other pod ever has.
    pub uid: [u8; NAME_LEN],
}

/// How pods are looked up, and how that goes. Text is padded with zero bytes; times are nanoseconds since the epoch, and 0
/// for never.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct KubernetesRecord {
    /// When the API server began to tell of pods, or ceased to.
    pub since: u64,
    /// When what is known was last known to be all there is.
    pub synced_at: u64,
    /// When the API server last failed to tell.
    pub failed_at: u64,
    /// 1 where pods are looked up, else 0.
    pub is_enabled: u32,
    /// 1 where the API server tells of pods now, else 0.
    pub is_connected: u32,
    /// How many pods are known.
    pub pods: u32,
    /// How many of them have no sandbox that could be found.
    pub awaited: u32,
    /// Number of pods that claim the cgroup of another pod.
    pub disputed: u64,
    /// The node's name in the cluster.
    pub node: [u8; LONG_NAME_LEN],
    /// What failed last, cut where it is longer.
    pub error: [u8; CONFIG_ERROR_LEN],
}

/// What the agent knows of an interface of the node.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct InterfaceRecord {
    /// Name, padded with zero bytes.
    pub name: [u8; 16],
    /// A [`Role`].
    pub role: u8,
    /// TC hooks that the interface should have: a [`TcHook::bit`] each.
    pub hooks: u8,
    /// The [`AttachMode`] of each hook, in the order of [`TcHook::ALL`].
    pub attach_modes: [u8; 2],
    /// 1 if the agent added the interface's clsact qdisc, else 0.
    pub owns_qdisc: u8,
    /// 1 while an attachment waits in the attach queue, else 0.
    pub pending: u8,
    /// An [`OwnPackets`].
    pub own_packets: u8,
    /// Zero.
    pub reserved: u8,
}

/// Packets that came in by an interface and that `node_egress` takes for the node's own.
#[repr(u8)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum OwnPackets {
    /// None, as for the interfaces of pods.
    #[default]
    None = 0,
    /// Packets with a socket, which TC redirected to this interface of the node.
    WithSocket = 1,
    /// Packets with the mark that another `node_egress` hook has set: they come back from an ifb device, or from a bridge port
    /// whose veth peer is in the node's network namespace too.
    Marked = 2,
}

impl InterfaceRecord {
    /// Number of the [`AttachMode`] of a hook.
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
}

/// Role of an interface on the node, which decides its hooks.
#[repr(u8)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Role {
    /// Any other interface of the node, such as a NIC without a route to an endpoint, a tunnel or a tap device.
    #[default]
    Other = 0,
    /// The host-side interface of a pod, or one that the operator included.
    Pod = 1,
    /// A route of the node to a protected endpoint leaves through this interface, or through a device on top of it.
    Uplink = 2,
    /// A bridge.
    Bridge = 3,
    /// Loopback.
    Loopback = 4,
    /// Excluded by the operator.
    Excluded = 5,
    /// An ifb device: receives only packets that TC redirects to it, which another hook has judged before.
    Ifb = 6,
}

impl Role {
    /// The role with this number, or `None` where no version of this layout has given it.
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

    /// The name, as users see it.
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

/// How a program is attached to an interface.
#[repr(u8)]
#[derive(Clone, Copy, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
pub enum AttachMode {
    /// Not at all.
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
    /// The name, as users see it.
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

const _: () = assert!(size_of::<Policy>() == 40);
const _: () = assert!(size_of::<CounterKey>() == 8);
const _: () = assert!(size_of::<Counter>() == 56);
const _: () = assert!(size_of::<InterfaceRecord>() == 24);
const _: () = assert!(size_of::<ProviderRecord>() == 32);
const _: () = assert!(size_of::<PodRecord>() == 896);
const _: () = assert!(size_of::<KubernetesRecord>() == 48 + 256 + 1024);
const _: () = assert!(size_of::<ConfigRecord>() == 24 + 512 + 1024 + 65_536);

#[cfg(feature = "user")]
mod pod {
    use super::{
        ConfigRecord, Counter, CounterKey, InterfaceRecord, KubernetesRecord, PodRecord, Policy,
        ProviderRecord,
    };
    use crate::{Address, Endpoint, Exemption, Filter, Grant, ProbeRecord, Subject};

    // SAFETY: repr(C), integers only, no padding: every bit pattern is a value.
    unsafe impl aya::Pod for Policy {}
    // SAFETY: as above.
    unsafe impl aya::Pod for CounterKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Counter {}
    // SAFETY: as above.
    unsafe impl aya::Pod for InterfaceRecord {}
    // SAFETY: as above.
    unsafe impl aya::Pod for ProviderRecord {}
    // SAFETY: as above.
    unsafe impl aya::Pod for ConfigRecord {}
    // SAFETY: as above.
    unsafe impl aya::Pod for PodRecord {}
    // SAFETY: as above.
    unsafe impl aya::Pod for KubernetesRecord {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Subject {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Address {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Endpoint {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Filter {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Exemption {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Grant {}
    // SAFETY: repr(C), integers only, no padding: every bit pattern is a value.
    unsafe impl aya::Pod for ProbeRecord {}
}
