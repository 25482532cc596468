//! Expedited RCU grace periods while many TCX links are detached.
//!
//! The kernel waits for a grace period for each link that it detaches, and holds RTNL while it waits (`tcx_link_release`,
//! kernel/bpf/tcx.c), so threads do not help. With expedited grace periods, it sends interrupts to the CPUs instead of waiting.

use std::fs;

/// sysfs file of the machine-wide setting (kernel/ksysfs.c).
const EXPEDITED: &str = "/sys/kernel/rcu_expedited";
/// Smallest number of links for which the setting is changed. Detaching fewer takes less than a second.
pub(crate) const MANY_LINKS: usize = 64;

/// Guard that keeps grace periods expedited until it is dropped.
#[derive(Debug)]
pub(crate) struct Expedited(());

impl Expedited {
    /// Expedites grace periods. Returns `None` if they are expedited already, or if that is not allowed, for example in a container
    /// with a read-only /sys.
    pub(crate) fn set() -> Option<Self> {
        if fs::read_to_string(EXPEDITED).ok()?.trim() != "0" {
            return None;
        }
        if let Err(error) = fs::write(EXPEDITED, "1") {
            log::debug!("failed to write {EXPEDITED}: {error}");
            return None;
        }
        Some(Self(()))
    }
}

impl Drop for Expedited {
    fn drop(&mut self) {
        if let Err(error) = fs::write(EXPEDITED, "0") {
            log::error!("failed to restore {EXPEDITED}, write 0 to it: {error}");
        }
    }
}
