//! Actions that bring a hook of an interface to its desired state: a pure function of desired and observed state.

pub mod repair_backoff;

use imds_ebpf_common::AttachMode;

/// A program of the agent at a hook of an interface.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Attachment {
    /// Attach mode; never [`AttachMode::None`].
    pub backend: AttachMode,
    /// Whether it is the program that this agent loaded.
    pub current: bool,
    /// Whether it is pinned where it belongs, so that it outlives the agent. Filters always are.
    pub pinned: bool,
    /// Where it stands among the programs of the hook.
    pub place: Order,
}

/// Where a program stands among the programs of its hook.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Order {
    /// First: no other program sees the packet before.
    First,
    /// Others come before, and it can be put before them.
    NotFirst,
    /// Others come before, and the attach mode has no place before them.
    Blocked,
}

impl Order {
    /// The name, as users see it.
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
    /// Attach, first in order.
    Attach(AttachMode),
    /// Put this agent's program in the place of the one there, with no moment between.
    Replace(AttachMode),
    /// Pin the link again.
    Pin(AttachMode),
    /// Put it before all others, with no moment without it.
    Reorder(AttachMode),
    /// Take it away.
    Detach(AttachMode),
}

impl Action {
    /// Reports whether the action repairs a hook that another program changed, if this agent had attached it before.
    /// Repairs that repeat should back off.
    #[must_use]
    pub fn is_repair(self) -> bool {
        match self {
            Self::Attach(_) | Self::Replace(_) | Self::Reorder(_) => true,
            Self::Pin(_) | Self::Detach(_) => false,
        }
    }
}

/// Plans the actions that bring a hook from `actual` to `wanted`, in their order: a new attachment comes before one of
/// another mode is detached, so that no packet passes between the two.
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
