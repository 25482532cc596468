//! Terms of the policy: mode, replies to denied requests, hooks and verdicts.

use core::mem;

use crate::packet::Packet;

/// Action for a request to a protected endpoint.
///
/// Zero is [`Mode::Enforce`], so that a map that was never written denies.
#[repr(u32)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Mode {
    /// Deny the request, and count it as denied.
    #[default]
    Enforce = 0,
    /// Let the request pass, and count it as audited.
    Audit = 1,
    /// Let the request pass, and count it as allowed.
    Off = 2,
}

impl Mode {
    /// Returns the mode with this number; for an unknown number, [`Mode::Enforce`].
    #[inline]
    #[must_use]
    pub const fn from_u32(mode: u32) -> Self {
        match mode {
            1 => Self::Audit,
            2 => Self::Off,
            _ => Self::Enforce,
        }
    }

    /// Returns the name in the configuration.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Enforce => "enforce",
            Self::Audit => "audit",
            Self::Off => "off",
        }
    }
}

/// Reply to a denied packet. A denied call on a socket fails with a [`DenyErrno`].
#[repr(u32)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum DenyAction {
    /// No reply: drops the packet silently.
    #[default]
    Drop = 0,
    /// TCP reset or ICMP error.
    Reject = 1,
    /// As [`DenyAction::Reject`]. Connections to the HTTP port of a metadata service get a response that explains the denial, see
    /// [`RedirectRecord::EXPLAINS`](crate::RedirectRecord::EXPLAINS).
    Explain = 2,
}

impl DenyAction {
    /// Returns the action with this number; for an unknown number, [`DenyAction::Drop`].
    #[inline(always)]
    #[must_use]
    pub const fn from_u32(action: u32) -> Self {
        match action {
            1 => Self::Reject,
            2 => Self::Explain,
            _ => Self::Drop,
        }
    }

    /// Returns the name in the configuration.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Drop => "drop",
            Self::Reject => "reject",
            Self::Explain => "explain",
        }
    }

    /// Reports whether a denied packet gets a reply.
    #[inline(always)]
    #[must_use]
    pub const fn replies(self) -> bool {
        match self {
            Self::Drop => false,
            Self::Reject | Self::Explain => true,
        }
    }
}

/// Error of a call that the socket hook denies. The values are the errno numbers of Linux on all supported architectures.
#[repr(u32)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum DenyErrno {
    /// Operation not permitted. The only error on kernels without `bpf_set_retval` for these programs.
    #[default]
    Eperm = 1,
    /// Network is unreachable, errno `ENETUNREACH`.
    Enetunreach = 101,
    /// Connection refused, errno `ECONNREFUSED`.
    Econnrefused = 111,
    /// No route to host, errno `EHOSTUNREACH`.
    Ehostunreach = 113,
}

impl DenyErrno {
    /// Returns the error with this number; for an unknown number, [`DenyErrno::Eperm`].
    #[must_use]
    pub const fn from_u32(errno: u32) -> Self {
        match errno {
            101 => Self::Enetunreach,
            111 => Self::Econnrefused,
            113 => Self::Ehostunreach,
            _ => Self::Eperm,
        }
    }

    /// Returns the name of the error in the configuration.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Eperm => "EPERM",
            Self::Enetunreach => "ENETUNREACH",
            Self::Econnrefused => "ECONNREFUSED",
            Self::Ehostunreach => "EHOSTUNREACH",
        }
    }
}

/// Hook of a BPF program of the agent.
#[repr(u8)]
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Hook {
    /// TC ingress of the host-side interface of a pod.
    FromPod = 1,
    /// TC egress of the node's interfaces.
    NodeEgress = 2,
    /// cgroup connect(2) and sendmsg(2) programs.
    Socket = 3,
    /// Calls and packets of pods in the node's network namespace.
    HostNetwork = 4,
    /// Packets that sockets of the node receive. Attached while a protected address is local to the node.
    LocalService = 5,
    /// Calls and packets of processes in the node's network namespace, while the configuration has an allow list of the node.
    NodeAllow = 6,
}

impl Hook {
    /// All hooks, in the order of their numbers.
    pub const ALL: [Self; 6] = [
        Self::FromPod,
        Self::NodeEgress,
        Self::Socket,
        Self::HostNetwork,
        Self::LocalService,
        Self::NodeAllow,
    ];

    /// Returns the bit of this hook in [`Policy::hooks`](crate::Policy::hooks).
    #[must_use]
    pub const fn bit(self) -> u32 {
        1 << self as u32
    }

    /// Returns the name in the configuration. [`Hook::NodeAllow`] has no key of that name: `node.allow` enables the hook.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::FromPod => "from_pod",
            Self::NodeEgress => "node_egress",
            Self::Socket => "socket",
            Self::HostNetwork => "host_network",
            Self::LocalService => "local_service",
            Self::NodeAllow => "node_allow",
        }
    }
}

/// Hook of a TC program.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum TcHook {
    /// TC ingress, as [`Hook::FromPod`].
    FromPod,
    /// TC egress, as [`Hook::NodeEgress`].
    NodeEgress,
}

impl TcHook {
    /// Both TC hooks, in the order of [`InterfaceRecord::attach_modes`](crate::InterfaceRecord::attach_modes).
    pub const ALL: [Self; 2] = [Self::FromPod, Self::NodeEgress];

    /// Returns the bit of this hook in [`InterfaceRecord::hooks`](crate::InterfaceRecord::hooks).
    #[must_use]
    pub const fn bit(self) -> u8 {
        1 << self as u8
    }

    /// Returns this hook as a [`Hook`].
    #[must_use]
    pub const fn hook(self) -> Hook {
        match self {
            Self::FromPod => Hook::FromPod,
            Self::NodeEgress => Hook::NodeEgress,
        }
    }
}

/// A set of TC hooks, as [`InterfaceRecord::hooks`](crate::InterfaceRecord::hooks) stores it.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct TcHookSet {
    bits: u8,
}

impl TcHookSet {
    /// Empty set: no TC hook.
    pub const NONE: Self = Self { bits: 0 };
    /// Set that contains only [`TcHook::FromPod`].
    pub const FROM_POD: Self = Self { bits: TcHook::FromPod.bit() };
    /// Set that contains only [`TcHook::NodeEgress`].
    pub const NODE_EGRESS: Self = Self { bits: TcHook::NodeEgress.bit() };
    /// Set that contains both TC hooks.
    pub const BOTH: Self = Self { bits: TcHook::FromPod.bit() | TcHook::NodeEgress.bit() };

    /// Creates the set from one [`TcHook::bit`] for each hook.
    #[must_use]
    pub const fn from_bits(bits: u8) -> Self {
        Self { bits }
    }

    /// Returns one [`TcHook::bit`] for each hook of the set.
    #[must_use]
    pub const fn bits(self) -> u8 {
        self.bits
    }

    /// Reports whether the set contains `hook`.
    #[must_use]
    pub const fn contains(self, hook: TcHook) -> bool {
        self.bits & hook.bit() != 0
    }

    /// Iterates over the hooks of the set, in the order of [`TcHook::ALL`].
    pub fn iter(self) -> impl Iterator<Item = TcHook> {
        TcHook::ALL.into_iter().filter(move |&hook| self.contains(hook))
    }
}

/// Result of the policy for one packet or call.
#[repr(u32)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Verdict {
    /// Passed because the destination is not a protected endpoint. Never counted.
    Unrelated = 0,
    /// Denied because the mode is [`Mode::Enforce`].
    Denied = 1,
    /// Passed because the mode is [`Mode::Audit`].
    Audited = 2,
    /// Passed because the mode is [`Mode::Off`].
    Off = 3,
    /// Passed because the port is allowed. Counted as allowed.
    Allowed = 4,
    /// Passed because the sender is exempt.
    Exempt = 5,
    /// Call that passed with another destination: the listener of a scoped exemption. Packets never get this verdict. A call that
    /// a listener only explains counts as [`Self::Denied`].
    Redirected = 6,
}

impl Verdict {
    /// Returns the name in events.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unrelated => "unrelated",
            Self::Denied => "denied",
            Self::Audited => "audited",
            Self::Off | Self::Allowed => "allowed",
            Self::Exempt => "exempt",
            Self::Redirected => "redirected",
        }
    }

    /// Returns the verdict with this number; for an unknown number, [`Verdict::Redirected`].
    #[inline(always)]
    #[must_use]
    pub const fn from_u32(verdict: u32) -> Self {
        match verdict {
            0 => Self::Unrelated,
            1 => Self::Denied,
            2 => Self::Audited,
            3 => Self::Off,
            4 => Self::Allowed,
            5 => Self::Exempt,
            _ => Self::Redirected,
        }
    }

    /// [`Self::from_u32`] without a comparison, because the verifier would follow each branch.
    ///
    /// # Safety
    ///
    /// `verdict` must be the number of a verdict.
    #[inline(always)]
    #[must_use]
    pub const unsafe fn from_u32_unchecked(verdict: u32) -> Self {
        // SAFETY: the caller guarantees that the number belongs to a verdict.
        unsafe { mem::transmute::<u32, Self>(verdict) }
    }

    /// Returns the same verdict and hides its value from the verifier, which then checks the code after it once, not once for
    /// each verdict.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "the number has 32 bits")]
    #[must_use]
    pub fn hide_bounds<P: Packet + ?Sized>(self, packet: &P) -> Self {
        // SAFETY: `verifier_opaque` returns the number of `self` unchanged.
        unsafe { Self::from_u32_unchecked(packet.verifier_opaque(self as usize) as u32) }
    }

    /// All verdicts that have counters.
    pub const COUNTED: [Self; 6] =
        [Self::Denied, Self::Audited, Self::Off, Self::Allowed, Self::Exempt, Self::Redirected];
}
