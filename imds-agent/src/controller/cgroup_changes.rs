//! Log lines and metrics of changes on cgroups.

use log::Level;

use super::Reconciler;
use crate::datapath::attach::cgroup_link::{CgroupChange, CgroupChangeKind};

impl Reconciler {
    /// Logs changes on cgroups, and counts those that repair what another program changed.
    pub(super) fn report_cgroups(&mut self, changes: Vec<CgroupChange>) {
        for CgroupChange { kind, is_new, text } in changes {
            let level = if is_new { Level::Info } else { self.change_log_level() };
            let count = u64::from(level == Level::Warn);
            let level = match kind {
                CgroupChangeKind::Attached => {
                    self.corrections.attached += count;
                    level
                }
                CgroupChangeKind::Replaced => {
                    self.corrections.replaced += count;
                    level
                }
                CgroupChangeKind::Pinned => {
                    self.corrections.pinned += count;
                    level
                }
                CgroupChangeKind::Reordered => {
                    self.corrections.reordered += count;
                    level
                }
                CgroupChangeKind::Detached | CgroupChangeKind::Recovered => Level::Info,
                CgroupChangeKind::Failed => Level::Error,
            };
            log::log!(level, "{text}");
        }
    }
}
