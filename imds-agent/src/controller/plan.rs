//! Plans the actions that bring a hook of an interface to its desired state: a pure function of desired and observed
//! state.

use imds_ebpf_common::AttachMode;

/// A program of this agent at a hook of an interface.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Attachment {
    /// Attach mode; never [`AttachMode::None`].
    pub backend: AttachMode,
    /// True for the program that this agent loaded, false for one of an earlier agent or of another program.
    pub current: bool,
    /// True if the link is pinned in the pin directory, so that it outlives the agent. Filters need no pin: always
    /// true.
    pub pinned: bool,
    /// Position among the programs of the hook.
    pub place: Order,
}

/// Position of a program among the programs of its hook.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Order {
    /// No other program runs before it.
    First,
    /// Other programs run before it, and it can be moved before them.
    NotFirst,
    /// Other programs run before it, and the attach mode offers no position before them.
    Blocked,
}

impl Order {
    /// Returns the name that `status` prints.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::First => "first",
            Self::NotFirst => "not_first",
            Self::Blocked => "blocked",
        }
    }
}

/// A change to one hook of an interface.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Action {
    /// Attach the program, first in order.
    Attach(AttachMode),
    /// Replace the program that is attached with this agent's, atomically.
    Replace(AttachMode),
    /// Pin the link in the pin directory again.
    Pin(AttachMode),
    /// Move the program before all others, without detaching it.
    Reorder(AttachMode),
    /// Detach the program from the hook.
    Detach(AttachMode),
}

impl Action {
    /// Reports whether the action repairs a hook that this agent had attached to and that another program changed.
    /// Repeated repairs should back off.
    #[must_use]
    pub fn is_repair(self) -> bool {
        match self {
            Self::Attach(_) | Self::Replace(_) | Self::Reorder(_) => true,
            Self::Pin(_) | Self::Detach(_) => false,
        }
    }
}

/// Plans the actions that bring a hook from `actual` to `wanted`, in order. A new attachment precedes the detachment of
/// one with another mode, so that no packet passes between the two.
#[must_use]
pub fn plan(wanted: AttachMode, actual: &[Attachment]) -> Vec<Action> {
    let mut actions = Vec::new();
    if wanted != AttachMode::None {
        match actual.iter().find(|attachment| attachment.backend == wanted) {
            None => actions.push(Action::Attach(wanted)),
            Some(Attachment { current, pinned, place, .. }) => {
                if !current {
                    actions.push(Action::Replace(wanted));
                }
                if !pinned {
                    actions.push(Action::Pin(wanted));
                }
                if *place == Order::NotFirst {
                    actions.push(Action::Reorder(wanted));
                }
            }
        }
    }
    let others = actual.iter().map(|attachment| attachment.backend).filter(|&backend| backend != wanted);
    actions.extend(others.map(Action::Detach));
    actions
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{
        Action::{Attach, Detach, Pin, Reorder, Replace},
        AttachMode::{Clsact, Netkit, None, Tcx},
        *,
    };

    const GOOD: Attachment = Attachment { backend: Tcx, current: true, pinned: true, place: Order::First };
    const FILTER: Attachment = Attachment { backend: Clsact, ..GOOD };
    const NETKIT: Attachment = Attachment { backend: Netkit, ..GOOD };

    #[test]
    fn nothing_to_do() {
        assert_eq!(plan(Tcx, &[GOOD]), []);
        assert_eq!(plan(Clsact, &[FILTER]), []);
        assert_eq!(plan(Clsact, &[Attachment { place: Order::Blocked, ..FILTER }]), []);
        assert_eq!(plan(None, &[]), []);
        assert_eq!(plan(Netkit, &[NETKIT]), []);
    }

    #[test]
    fn each_drift_has_its_repair() {
        assert_eq!(plan(Tcx, &[]), [Attach(Tcx)]);
        assert_eq!(plan(Tcx, &[Attachment { current: false, ..GOOD }]), [Replace(Tcx)]);
        assert_eq!(plan(Tcx, &[Attachment { pinned: false, ..GOOD }]), [Pin(Tcx)]);
        assert_eq!(plan(Tcx, &[Attachment { place: Order::NotFirst, ..GOOD }]), [Reorder(Tcx)]);
        assert_eq!(plan(None, &[GOOD, FILTER]), [Detach(Tcx), Detach(Clsact)]);
    }

    #[test]
    fn mode_change_attaches_before_detaching() {
        assert_eq!(plan(Clsact, &[GOOD]), [Attach(Clsact), Detach(Tcx)]);
        assert_eq!(plan(Tcx, &[FILTER]), [Attach(Tcx), Detach(Clsact)]);
        assert_eq!(plan(Netkit, &[GOOD, FILTER]), [Attach(Netkit), Detach(Tcx), Detach(Clsact)]);
        assert_eq!(plan(Tcx, &[NETKIT]), [Attach(Tcx), Detach(Netkit)]);
    }

    #[test]
    fn netkit_links_are_repaired() {
        assert_eq!(plan(Netkit, &[]), [Attach(Netkit)]);
        let drifted = Attachment { current: false, pinned: false, place: Order::NotFirst, ..NETKIT };
        assert_eq!(plan(Netkit, &[drifted]), [Replace(Netkit), Pin(Netkit), Reorder(Netkit)]);
        assert_eq!(plan(None, &[NETKIT]), [Detach(Netkit)]);
    }

    #[test]
    fn repairs_differ_from_other_actions() {
        assert!([Attach(Tcx), Replace(Netkit), Reorder(Clsact)].into_iter().all(Action::is_repair));
        assert!(![Pin(Tcx), Detach(Tcx)].into_iter().any(Action::is_repair));
    }

    proptest! {
        #[test]
        fn desired_mode_is_never_detached(current: bool, pinned: bool, count in 0..=3_usize) {
            let there = [Attachment { current, pinned, ..GOOD }, FILTER, NETKIT];
            for wanted in [Tcx, Clsact, Netkit] {
                let actions = plan(wanted, &there[..count]);
                prop_assert!(!actions.contains(&Detach(wanted)));
                let first_detach = actions.iter().position(|action| matches!(action, Detach(_)));
                let attach = actions.iter().position(|action| matches!(action, Attach(_)));
                prop_assert!(attach.is_none() || first_detach.is_none() || attach < first_detach);
            }
        }
    }
}
