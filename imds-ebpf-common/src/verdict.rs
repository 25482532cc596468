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
        Some(destination) if endpoint::is_guarded(destination) => match mode() {
            Mode::Enforce => Verdict::Deny,
            Mode::Audit => Verdict::Audit,
            Mode::Off => Verdict::Allow,
        },
        Some(_) | None => Verdict::Foreign,
    }
}
