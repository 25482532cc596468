//! Short grace periods while many TCX links are detached.
//!
//! The kernel waits for a grace period for each link that it detaches, with RTNL held (`tcx_link_release`, kernel/bpf/tcx.c), so
//! that threads do not help. If grace periods are expedited, it sends interrupts to the CPUs instead of waiting.

use std::fs;

/// Setting of the machine (kernel/ksysfs.c).
const EXPEDITED: &str = "/sys/kernel/rcu_expedited";
/// Number of links from which on the setting is changed: fewer are detached within a second.
pub(super) const MANY_LINKS: usize = 64;

/// Grace periods are expedited until this is dropped.
#[derive(Debug)]
pub(super) struct Expedited(());

impl Expedited {
    /// Expedites grace periods, unless the machine does so anyway. Returns `None` if that is not allowed, as in a container with a
    /// read-only /sys.
    pub(super) fn set() -> Option<Self> {
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
