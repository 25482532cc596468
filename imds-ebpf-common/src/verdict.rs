//! The verdict: one pure function of the packet and the policy.

use crate::{
    endpoint,
    packet::{self, Frame, Packet},
};

/// What is done with a packet to a guarded endpoint.
///
/// Zero is [`Mode::Enforce`], so that a map that was never written denies.
#[repr(u32)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Mode {
    /// Deny it.
    #[default]
    Enforce = 0,
    /// Let it pass, but count it as one that would have been denied.
    Audit = 1,
    /// Let it pass.
    Off = 2,
}

impl Mode {
    /// The mode with this number; a number that no version has given is [`Mode::Enforce`].
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

/// Where a program of ours sees traffic.
#[repr(u8)]
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Hook {
    /// TC ingress of the node's end of a pod's link.
    PodEdge = 1,
    /// TC egress of an interface of the node's own.
    NodeEdge = 2,
    /// connect(2) and sendmsg(2) of a socket, by cgroup.
    Socket = 3,
}

impl Hook {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::PodEdge, Self::NodeEdge, Self::Socket];

    /// This hook's bit in [`Policy::hooks`](crate::Policy::hooks).
    #[must_use]
    pub const fn bit(self) -> u32 {
        1 << self as u32
    }

    /// The name, as it is in the configuration.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::PodEdge => "pod_edge",
            Self::NodeEdge => "node_edge",
            Self::Socket => "socket",
        }
    }
}

/// The hooks that are TC's.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Edge {
    /// [`Hook::PodEdge`].
    Pod,
    /// [`Hook::NodeEdge`].
    Node,
}

impl Edge {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Pod, Self::Node];

    /// The hook that it is.
    #[must_use]
    pub const fn hook(self) -> Hook {
        match self {
            Self::Pod => Hook::PodEdge,
            Self::Node => Hook::NodeEdge,
        }
    }
}

/// The outcome for one packet.
#[repr(u32)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Verdict {
    /// Not addressed to a guarded endpoint: none of our business, and never counted.
    Foreign = 0,
    /// To a guarded endpoint, dropped.
    Deny = 1,
    /// To a guarded endpoint, passed because the mode is [`Mode::Audit`].
    Audit = 2,
    /// To a guarded endpoint, passed because the mode is [`Mode::Off`].
    Allow = 3,
}

impl Verdict {
    /// The verdicts that are counted.
    pub const COUNTED: [Self; 3] = [Self::Deny, Self::Audit, Self::Allow];
}

/// Judges a packet that a pod sent.
///
/// `mode` is asked only for a packet to a guarded endpoint, so that every other packet costs no map lookup.
#[inline(always)]
pub fn judge<P: Packet + ?Sized>(packet: &P, frame: Frame, mode: impl FnOnce() -> Mode) -> Verdict {
    match packet::ipv4_destination(packet, frame) {
        Some(destination) => judge_ipv4(destination, mode),
        None => Verdict::Foreign,
    }
}

/// Judges an IPv4 destination, in network byte order.
#[inline(always)]
pub fn judge_ipv4(destination: [u8; 4], mode: impl FnOnce() -> Mode) -> Verdict {
    if !endpoint::is_guarded(destination) {
        return Verdict::Foreign;
    }
    match mode() {
        Mode::Enforce => Verdict::Deny,
        Mode::Audit => Verdict::Audit,
        Mode::Off => Verdict::Allow,
    }
}

/// Judges an IPv6 destination, in network byte order: an IPv4-mapped one (RFC 4291, 2.5.5.2), by which an IPv6 socket
/// sends IPv4 packets, is judged as what it maps.
#[inline(always)]
pub fn judge_ipv6(destination: [u8; 16], mode: impl FnOnce() -> Mode) -> Verdict {
    match destination {
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d] => judge_ipv4([a, b, c, d], mode),
        _ => Verdict::Foreign,
    }
}
