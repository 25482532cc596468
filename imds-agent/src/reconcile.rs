//! What is to be done about an interface: a pure function of what is wanted and what is there.

use imds_ebpf_common::AttachMode;

/// One program of ours on an interface.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Attachment {
    /// How it is attached: [`AttachMode::Tcx`] or [`AttachMode::Clsact`].
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
    /// Others come before that this backend can't get in front of.
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

/// A change to one interface.
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

/// The actions that bring an interface from `actual` to `wanted`, in their order: what guards comes before what
/// unguards.
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
        AttachMode::{Clsact, None, Tcx},
        *,
    };

    const GOOD: Attachment = Attachment { backend: Tcx, current: true, pinned: true, place: Order::First };
    const FILTER: Attachment = Attachment { backend: Clsact, ..GOOD };

    #[test]
    fn nothing_to_do() {
        assert_eq!(plan(Tcx, &[GOOD]), []);
        assert_eq!(plan(Clsact, &[FILTER]), []);
        assert_eq!(plan(Clsact, &[Attachment { place: Order::Blocked, ..FILTER }]), []);
        assert_eq!(plan(None, &[]), []);
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
    fn a_change_of_backend_attaches_before_it_detaches() {
        assert_eq!(plan(Clsact, &[GOOD]), [Attach(Clsact), Detach(Tcx)]);
        assert_eq!(plan(Tcx, &[FILTER]), [Attach(Tcx), Detach(Clsact)]);
    }

    proptest! {
        #[test]
        fn a_wanted_backend_is_never_detached(current: bool, pinned: bool, both: bool) {
            let there = [Attachment { current, pinned, ..GOOD }, FILTER];
            let there = if both { &there[..] } else { &there[..1] };
            for wanted in [Tcx, Clsact] {
                prop_assert!(!plan(wanted, there).contains(&Detach(wanted)));
            }
        }
    }
}
