//! Expedited RCU grace periods while many TCX links are detached.
//!
//! The kernel waits for a grace period for each link that it detaches, and holds RTNL while it waits (`tcx_link_release`,
//! kernel/bpf/tcx.c), so threads do not help. With expedited grace periods, it sends interrupts to the CPUs instead of waiting.
//!
//! The setting applies to the whole machine. A directory in the pin directory records that it must be restored, so that a
//! killed `unload` does not leave it changed: the next `unload` or agent restores it. Both are gone after a reboot.

use std::{fs, path::PathBuf};

use crate::datapath::pin::{
    contents::is_directory,
    dir::{PinDir, ignore_missing},
};

/// sysfs file of the machine-wide setting (kernel/ksysfs.c).
const EXPEDITED: &str = "/sys/kernel/rcu_expedited";
/// Name of the directory that records the change.
pub(crate) const RECORD: &str = "rcu_expedited";
/// Smallest number of links for which the setting is changed. Detaching fewer takes less than a second.
pub(crate) const MANY_LINKS: usize = 64;

/// Guard that keeps grace periods expedited until it is dropped.
#[derive(Debug)]
pub(crate) struct Expedited {
    record: PathBuf,
}

impl Expedited {
    /// Expedites grace periods. Returns `None` if they are expedited already, if that is not allowed, for example in a
    /// container with a read-only /sys, or if the change can't be recorded.
    pub(crate) fn set(pins: &PinDir) -> Option<Self> {
        if !has_setting("0") {
            return None;
        }
        let record = record(pins);
        if let Err(error) = fs::create_dir(&record) {
            log::debug!("failed to create {}: {error}", record.display());
            return None;
        }
        if let Err(error) = fs::write(EXPEDITED, "1") {
            log::debug!("failed to write {EXPEDITED}: {error}");
            remove(&record);
            return None;
        }
        Some(Self { record })
    }
}

impl Drop for Expedited {
    fn drop(&mut self) {
        restore_setting();
        remove(&self.record);
    }
}

/// Restores the setting if an `unload` that was killed has left it changed. The caller holds the lock of the pin directory, so
/// that no `unload` of it runs.
pub(crate) fn restore_if_recorded(pins: &PinDir) {
    let record = record(pins);
    if !is_directory(&record) {
        return;
    }
    if has_setting("1") && restore_setting() {
        log::warn!("restored {EXPEDITED}: an `unload` was killed before it could");
    }
    remove(&record);
}

fn record(pins: &PinDir) -> PathBuf {
    pins.root().join(RECORD)
}

fn has_setting(value: &str) -> bool {
    fs::read_to_string(EXPEDITED).is_ok_and(|text| text.trim() == value)
}

fn restore_setting() -> bool {
    let written = fs::write(EXPEDITED, "0");
    if let Err(error) = &written {
        log::error!("failed to restore {EXPEDITED}, write 0 to it: {error}");
    }
    written.is_ok()
}

fn remove(record: &PathBuf) {
    if let Err(error) = ignore_missing(fs::remove_dir(record)) {
        log::warn!("failed to remove {}: {error}", record.display());
    }
}
