//! The verdict: one pure function of the packet and the policy.

use core::mem;

use crate::{
    address::{Address, Destination},
    endpoint::{Keep, Service, keeps, keeps_any},
    packet::{self, Frame, Packet, Place, find_header},
    tables::Tables,
};

/// Action for a request to a protected endpoint.
///
/// Zero is [`Mode::Enforce`], so that a map that was never written denies.
#[repr(u32)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Mode {
    /// Deny the request.
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

    /// The name, as it is in the configuration.
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
    /// Nothing.
    #[default]
    Drop = 0,
    /// A TCP reset, or an ICMP error.
    Reject = 1,
}

impl DenyAction {
    /// Returns the action with this number; for an unknown number, [`DenyAction::Drop`].
    #[inline(always)]
    #[must_use]
    pub const fn from_u32(answer: u32) -> Self {
        match answer {
            1 => Self::Reject,
            _ => Self::Drop,
        }
    }

    /// The name, as it is in the configuration.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Drop => "drop",
            Self::Reject => "reject",
        }
    }
}

/// Error of a call that the socket hook denies: the number of the errno in Linux, on all architectures of the agent.
#[repr(u32)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum DenyErrno {
    /// Operation not permitted. Kernels that can't choose the error always answer so.
    #[default]
    Eperm = 1,
    /// Network is unreachable.
    Enetunreach = 101,
    /// Connection refused.
    Econnrefused = 111,
    /// No route to host.
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

    /// Name of the error, as the configuration has it.
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
    /// Packets that sockets of the node receive, while a protected address is local to the node.
    LocalService = 5,
}

impl Hook {
    /// All hooks.
    pub const ALL: [Self; 5] =
        [Self::FromPod, Self::NodeEgress, Self::Socket, Self::HostNetwork, Self::LocalService];

    /// This hook's bit in [`Policy::hooks`](crate::Policy::hooks).
    #[must_use]
    pub const fn bit(self) -> u32 {
        1 << self as u32
    }

    /// The name, as it is in the configuration.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::FromPod => "from_pod",
            Self::NodeEgress => "node_egress",
            Self::Socket => "socket",
            Self::HostNetwork => "host_network",
            Self::LocalService => "local_service",
        }
    }
}

/// Hook of a TC program.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum TcHook {
    /// [`Hook::FromPod`].
    FromPod,
    /// [`Hook::NodeEgress`].
    NodeEgress,
}

impl TcHook {
    /// Both.
    pub const ALL: [Self; 2] = [Self::FromPod, Self::NodeEgress];

    /// This hook's bit in [`InterfaceRecord::hooks`](crate::InterfaceRecord::hooks).
    #[must_use]
    pub const fn bit(self) -> u8 {
        1 << self as u8
    }

    /// The hook that it is.
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
    /// The empty set.
    pub const NONE: Self = Self { bits: 0 };
    /// Only [`TcHook::FromPod`].
    pub const FROM_POD: Self = Self { bits: TcHook::FromPod.bit() };
    /// Only [`TcHook::NodeEgress`].
    pub const NODE_EGRESS: Self = Self { bits: TcHook::NodeEgress.bit() };
    /// Both hooks.
    pub const BOTH: Self = Self { bits: TcHook::FromPod.bit() | TcHook::NodeEgress.bit() };

    /// The set with these bits.
    #[must_use]
    pub const fn from_bits(bits: u8) -> Self {
        Self { bits }
    }

    /// One [`TcHook::bit`] for each hook of the set.
    #[must_use]
    pub const fn bits(self) -> u8 {
        self.bits
    }

    /// Reports whether the set contains `hook`.
    #[must_use]
    pub const fn has(self, hook: TcHook) -> bool {
        self.bits & hook.bit() != 0
    }

    /// The hooks of the set.
    pub fn iter(self) -> impl Iterator<Item = TcHook> {
        TcHook::ALL.into_iter().filter(move |&hook| self.has(hook))
    }
}

/// The outcome for one packet.
#[repr(u32)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Verdict {
    /// Not to a protected endpoint. Never counted.
    Foreign = 0,
    /// Denied.
    Deny = 1,
    /// Passed because the mode is [`Mode::Audit`].
    Audit = 2,
    /// Passed because the mode is [`Mode::Off`].
    Allow = 3,
    /// To an allowed port of the endpoint. Counted as allowed.
    Kept = 4,
    /// From an exempt sender.
    Exempt = 5,
}

impl Verdict {
    /// The name, as events have it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Foreign => "foreign",
            Self::Deny => "deny",
            Self::Audit => "audit",
            Self::Allow => "allow",
            Self::Kept => "kept",
            Self::Exempt => "exempt",
        }
    }

    /// The verdict with this number.
    #[inline(always)]
    #[must_use]
    pub const fn from_u32(verdict: u32) -> Self {
        match verdict {
            0 => Self::Foreign,
            1 => Self::Deny,
            2 => Self::Audit,
            3 => Self::Allow,
            4 => Self::Kept,
            _ => Self::Exempt,
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
        // SAFETY: the caller says so.
        unsafe { mem::transmute::<u32, Self>(verdict) }
    }

    /// Returns the verdict as a number that the verifier cannot follow. The verifier then checks the rest once, not once for
    /// each verdict.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "it comes back as it went")]
    #[must_use]
    pub fn without_origin<P: Packet + ?Sized>(self, packet: &P) -> Self {
        // SAFETY: the number is the one of `self`.
        unsafe { Self::from_u32_unchecked(packet.forget_origin(self as usize) as u32) }
    }

    /// The verdicts that are counted.
    pub const COUNTED: [Self; 5] = [Self::Deny, Self::Audit, Self::Allow, Self::Kept, Self::Exempt];
}

/// Returns the verdict on a packet without exemptions: the fast path first, then the slow path.
#[inline(always)]
pub fn judge<P, T>(packet: &P, frame: Frame, tables: &T) -> Verdict
where
    P: Packet + ?Sized,
    T: Tables + ?Sized,
{
    if is_plainly_foreign(packet, frame, tables) {
        return Verdict::Foreign;
    }
    judge_thoroughly(packet, frame, tables)
}

/// Fast path. Returns `true` if the packet certainly is not for a protected endpoint; `false` decides nothing.
#[inline(always)]
pub fn is_plainly_foreign<P, T>(packet: &P, frame: Frame, tables: &T) -> bool
where
    P: Packet + ?Sized,
    T: Tables + ?Sized,
{
    packet::is_plainly_foreign(packet, frame, tables)
}

/// Slow path. Returns the verdict on a packet without exemptions.
///
/// Looks up the endpoint only if the filter has the bit of the address, and the mode only for an endpoint.
#[inline(always)]
pub fn judge_thoroughly<P, T>(packet: &P, frame: Frame, tables: &T) -> Verdict
where
    P: Packet + ?Sized,
    T: Tables + ?Sized,
{
    find_header(packet, frame)
        .and_then(|place| examine(packet, place, tables))
        .map_or(Verdict::Foreign, |examined| examined.verdict)
}

/// A packet to a protected endpoint.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Examined {
    /// Verdict on senders without an exemption.
    pub verdict: Verdict,
    /// Address of the endpoint.
    pub destination: Address,
}

/// Judges a packet by the IP header at `place`. Returns `None` for [`Verdict::Foreign`].
#[inline(always)]
pub fn examine<P, T>(packet: &P, place: Place, tables: &T) -> Option<Examined>
where
    P: Packet + ?Sized,
    T: Tables + ?Sized,
{
    let destination = packet::destination(packet, place)?;
    let (slot, address) = (destination.slot(), destination.address().without_origin(packet));
    let keep = tables.keep(slot, &address)?;
    let verdict = if keeps_any(keep) {
        decide(keep, packet.service(place).unwrap_or(Service::NONE).without_origin(packet), tables)
    } else {
        by_mode(tables)
    };
    Some(Examined { verdict: verdict.without_origin(packet), destination: address })
}

/// Returns the verdict on a call to `address`. `service` is `None` if protocol or port is unknown.
#[inline(always)]
pub fn judge_address<T: Tables + ?Sized>(address: Address, service: Option<Service>, tables: &T) -> Verdict {
    let destination = Destination::from_ipv6(address.octets());
    let slot = destination.slot();
    if !tables.may_guard(slot) {
        return Verdict::Foreign;
    }
    match tables.keep(slot, &destination.address()) {
        Some(keep) => decide(keep, service.unwrap_or(Service::NONE), tables),
        None => Verdict::Foreign,
    }
}

#[inline(always)]
fn decide<T: Tables + ?Sized>(keep: &Keep, service: Service, tables: &T) -> Verdict {
    if keeps(keep, service) {
        return Verdict::Kept;
    }
    by_mode(tables)
}

#[inline(always)]
fn by_mode<T: Tables + ?Sized>(tables: &T) -> Verdict {
    match tables.mode() {
        Mode::Enforce => Verdict::Deny,
        Mode::Audit => Verdict::Audit,
        Mode::Off => Verdict::Allow,
    }
}
