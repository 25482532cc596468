//! Plans the actions that bring a hook of an interface to its desired state: a pure function of desired and observed
//! state.

use imds_ebpf_common::AttachMode;

use crate::datapath::attach::attachment::{Action, Attachment, Order};

/// Plans the actions that bring a hook from `observed` to `desired`, in order. A new attachment precedes the detachment of
/// one with another mode, so that no packet passes between the two.
pub fn plan(desired: AttachMode, observed: &[Attachment]) -> Vec<Action> {
    let mut actions = Vec::new();
    if desired != AttachMode::None {
        match observed.iter().find(|attachment| attachment.backend == desired) {
            None => actions.push(Action::Attach(desired)),
            Some(Attachment { current, pinned, order, .. }) => {
                if !current {
                    actions.push(Action::Replace(desired));
                }
                if !pinned {
                    actions.push(Action::Pin(desired));
                }
                if *order == Order::NotFirst {
                    actions.push(Action::Reorder(desired));
                }
            }
        }
    }
    let others = observed.iter().map(|attachment| attachment.backend).filter(|&backend| backend != desired);
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

    const GOOD: Attachment = Attachment { backend: Tcx, current: true, pinned: true, order: Order::First };
    const FILTER: Attachment = Attachment { backend: Clsact, ..GOOD };
    const NETKIT: Attachment = Attachment { backend: Netkit, ..GOOD };

    #[test]
    fn nothing_to_do() {
        assert_eq!(plan(Tcx, &[GOOD]), []);
        assert_eq!(plan(Clsact, &[FILTER]), []);
        assert_eq!(plan(Clsact, &[Attachment { order: Order::Blocked, ..FILTER }]), []);
        assert_eq!(plan(None, &[]), []);
        assert_eq!(plan(Netkit, &[NETKIT]), []);
    }

    #[test]
    fn each_drift_has_its_repair() {
        assert_eq!(plan(Tcx, &[]), [Attach(Tcx)]);
        assert_eq!(plan(Tcx, &[Attachment { current: false, ..GOOD }]), [Replace(Tcx)]);
        assert_eq!(plan(Tcx, &[Attachment { pinned: false, ..GOOD }]), [Pin(Tcx)]);
        assert_eq!(plan(Tcx, &[Attachment { order: Order::NotFirst, ..GOOD }]), [Reorder(Tcx)]);
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
        let drifted = Attachment { current: false, pinned: false, order: Order::NotFirst, ..NETKIT };
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
            for desired in [Tcx, Clsact, Netkit] {
                let actions = plan(desired, &there[..count]);
                prop_assert!(!actions.contains(&Detach(desired)));
                let first_detach = actions.iter().position(|action| matches!(action, Detach(_)));
                let attach = actions.iter().position(|action| matches!(action, Attach(_)));
                prop_assert!(attach.is_none() || first_detach.is_none() || attach < first_detach);
            }
        }
    }
}
