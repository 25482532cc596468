//! Decides if the sendmsg programs of the `socket` hook are attached.

use imds_ebpf_common::Hook;
use strum::{FromRepr, IntoStaticStr};

use crate::config::{Hooks, Sendmsg};

/// Inputs of [`sendmsg_reason`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct SendmsgInputs {
    /// Value of `hooks.sendmsg` in the configuration.
    pub setting: Sendmsg,
    /// Hooks that the configuration enables.
    pub hooks: Hooks,
    /// True if TC programs can read the netns cookie of a packet's socket (Linux 6.13).
    pub has_tc_cookie: bool,
    /// True if all interfaces are enforced, and no userspace datapath forwards packets past them.
    pub is_enforced: bool,
}

/// Reason why the sendmsg programs are attached. The numbers are those of
/// [`CgroupRecord::sendmsg`](imds_ebpf_common::CgroupRecord::sendmsg), the texts are those of `status`.
#[repr(u32)]
#[derive(Clone, Copy, Debug, Eq, FromRepr, IntoStaticStr, PartialEq)]
pub enum SendmsgReason {
    /// The configuration sets `hooks.sendmsg` to true.
    #[strum(serialize = "hooks.sendmsg is true")]
    Configured = 1,
    /// The configuration disables the `from_pod` hook.
    #[strum(serialize = "from_pod is off")]
    FromPodOff = 2,
    /// The configuration disables the `node_egress` hook.
    #[strum(serialize = "node_egress is off")]
    NodeEgressOff = 3,
    /// Before Linux 6.13 `node_egress` cannot identify packets of macvlan, ipvlan and netkit pods.
    #[strum(
        serialize = "node_egress cannot identify packets of macvlan, ipvlan and netkit pods before Linux 6.13"
    )]
    NoTcCookie = 4,
    /// An interface is not enforced, because it lacks a program or Open vSwitch forwards its packets in userspace.
    #[strum(serialize = "an interface is not enforced")]
    NotEnforced = 5,
}

/// Returns the reason why the sendmsg programs are needed, or `None` if they are not. They add a cost to each sendto(2) on an
/// unconnected UDP socket of the node, so they run only if `from_pod` and `node_egress` do not cover all pods whose packets the
/// node forwards. The agent cannot tell if a pod has another device (host-device, SR-IOV): such a device is in the pod's network
/// namespace only. For these pods the operator sets `hooks.sendmsg` to true.
pub fn sendmsg_reason(inputs: SendmsgInputs) -> Option<SendmsgReason> {
    let SendmsgInputs { setting, hooks, has_tc_cookie, is_enforced } = inputs;
    if !hooks.contains(Hook::Socket) || setting == Sendmsg::Off {
        return None;
    }
    let reasons = [
        (SendmsgReason::Configured, setting == Sendmsg::On),
        (SendmsgReason::FromPodOff, !hooks.contains(Hook::FromPod)),
        (SendmsgReason::NodeEgressOff, !hooks.contains(Hook::NodeEgress)),
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
        let reasons = [
            SendmsgReason::Configured,
            SendmsgReason::FromPodOff,
            SendmsgReason::NodeEgressOff,
            SendmsgReason::NoTcCookie,
            SendmsgReason::NotEnforced,
        ];
        assert_eq!([1, 2, 3, 4, 5].map(SendmsgReason::from_repr), reasons.map(Some));
        assert_eq!([0, 6].map(SendmsgReason::from_repr), [None, None]);
    }
}
