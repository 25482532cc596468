//! The decision whether the sendmsg programs run.

use imds_ebpf_common::Hook;

use crate::config::{Hooks, Sendmsg};

/// Facts that decide whether unconnected UDP needs the sendmsg programs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct SendmsgInputs {
    /// `hooks.sendmsg` of the configuration.
    pub setting: Sendmsg,
    /// The hooks that are on.
    pub hooks: Hooks,
    /// TC programs can read the network namespace cookie of a packet's socket (Linux 6.13).
    pub has_tc_cookie: bool,
    /// Every interface has its programs.
    pub is_enforced: bool,
}

/// Reason why the sendmsg programs are attached. The numbers are those of
/// [`CgroupRecord::sendmsg`](imds_ebpf_common::CgroupRecord::sendmsg).
#[repr(u32)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum SendmsgReason {
    /// `hooks.sendmsg` is true.
    Configured = 1,
    /// `hooks.from_pod` is false.
    FromPodOff = 2,
    /// `hooks.node_egress` is false.
    NodeEgressOff = 3,
    /// Before Linux 6.13 `node_egress` cannot identify packets of macvlan, ipvlan and netkit pods.
    NoTcCookie = 4,
    /// An interface lacks a program.
    NotEnforced = 5,
}

impl SendmsgReason {
    /// All reasons.
    pub const ALL: [Self; 5] =
        [Self::Configured, Self::FromPodOff, Self::NodeEgressOff, Self::NoTcCookie, Self::NotEnforced];

    /// The reason with this number, or `None` if the number stands for none.
    #[must_use]
    pub fn from_u32(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|&reason| reason as u32 == number)
    }

    /// The reason in words.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::Configured => "hooks.sendmsg is true",
            Self::FromPodOff => "from_pod is off",
            Self::NodeEgressOff => "node_egress is off",
            Self::NoTcCookie => {
                "this kernel cannot tell macvlan, ipvlan and netkit pods at node_egress (Linux 6.13 can)"
            }
            Self::NotEnforced => "an interface lacks a hook",
        }
    }
}

/// Decides whether the sendmsg programs are needed. They cost each unconnected UDP sendto(2) of the node, so that they
/// run only if `from_pod` and `node_egress` do not judge the packets of every pod.
#[must_use]
pub fn sendmsg_reason(inputs: SendmsgInputs) -> Option<SendmsgReason> {
    let SendmsgInputs { setting, hooks, has_tc_cookie, is_enforced } = inputs;
    if !hooks.has(Hook::Socket) || setting == Sendmsg::Off {
        return None;
    }
    let reasons = [
        (SendmsgReason::Configured, setting == Sendmsg::On),
        (SendmsgReason::FromPodOff, !hooks.has(Hook::FromPod)),
        (SendmsgReason::NodeEgressOff, !hooks.has(Hook::NodeEgress)),
        (SendmsgReason::NoTcCookie, !has_tc_cookie),
        (SendmsgReason::NotEnforced, !is_enforced),
    ];
    reasons.into_iter().find(|(_, applies)| *applies).map(|(reason, _)| reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hooks(on: &[Hook]) -> Hooks {
        Hooks::from_bits(on.iter().map(|hook| hook.bit()).sum())
    }

    fn inputs() -> SendmsgInputs {
        let hooks = hooks(&[Hook::FromPod, Hook::NodeEgress, Hook::Socket]);
        SendmsgInputs { setting: Sendmsg::Auto, hooks, has_tc_cookie: true, is_enforced: true }
    }

    #[test]
    fn not_needed_if_all_pods_are_covered() {
        assert_eq!(sendmsg_reason(inputs()), None);
    }

    #[test]
    fn needed_for_each_gap() {
        let with = |on: &[Hook]| SendmsgInputs { hooks: hooks(on), ..inputs() };
        let cases = [
            (with(&[Hook::NodeEgress, Hook::Socket]), SendmsgReason::FromPodOff),
            (with(&[Hook::FromPod, Hook::Socket]), SendmsgReason::NodeEgressOff),
            (SendmsgInputs { has_tc_cookie: false, ..inputs() }, SendmsgReason::NoTcCookie),
            (SendmsgInputs { is_enforced: false, ..inputs() }, SendmsgReason::NotEnforced),
        ];
        for (inputs, reason) in cases {
            assert_eq!(sendmsg_reason(inputs), Some(reason), "{inputs:?}");
            assert_eq!(sendmsg_reason(SendmsgInputs { setting: Sendmsg::Off, ..inputs }), None);
        }
    }

    #[test]
    fn setting_takes_precedence() {
        let on = SendmsgInputs { setting: Sendmsg::On, ..inputs() };
        assert_eq!(sendmsg_reason(on), Some(SendmsgReason::Configured));
        let without_socket = SendmsgInputs { hooks: hooks(&[Hook::FromPod]), ..on };
        assert_eq!(sendmsg_reason(without_socket), None);
    }

    #[test]
    fn reasons_by_number() {
        assert_eq!(
            SendmsgReason::ALL.map(|reason| SendmsgReason::from_u32(reason as u32)),
            SendmsgReason::ALL.map(Some)
        );
        assert_eq!((SendmsgReason::from_u32(0), SendmsgReason::from_u32(6)), (None, None));
    }
}
