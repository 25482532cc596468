//! Programs on cgroups: attaches them as the node changes, and reports the changes.

use std::{collections::BTreeSet, io};

use imds_ebpf_common::Hook;
use log::Level;

use super::Reconciler;
use crate::{
    datapath::{
        DatapathError,
        attach::cgroup_link::{CgroupChange, CgroupChangeKind},
    },
    node::kubepods::{self, Kubepods},
};

impl Reconciler {
    pub(super) fn reconcile_sockets(&mut self) -> Result<(), DatapathError> {
        let changes = self.datapath.restore_sockets();
        self.report_cgroups(changes)
    }

    /// Attaches the sendmsg programs while the programs of interfaces do not see all packets, and detaches them otherwise.
    pub(super) fn reconcile_sendmsg(&mut self) -> Result<(), DatapathError> {
        let changes = self.datapath.set_enforced(self.node.is_enforced());
        self.report_cgroups(changes)
    }

    /// Attaches the `local_service` hook while a protected address is local to the node, and detaches it otherwise.
    pub(super) async fn reconcile_local_service(&mut self) -> Result<(), DatapathError> {
        let is_local = self.netlink.has_local_endpoint().await?;
        let changes = self.datapath.restore_local_service(is_local);
        self.report_cgroups(changes)
    }

    /// Waits until the cgroups of Kubernetes pods may have changed.
    pub async fn kubepods_changed(&self) {
        match &self.kubepods {
            Some(kubepods) => kubepods.changed().await,
            None => std::future::pending().await,
        }
    }

    /// Handles changes of the cgroups of Kubernetes pods.
    pub fn on_kubepods_changed(&mut self) -> Result<(), DatapathError> {
        let followed = self.kubepods.as_mut().map(Kubepods::follow);
        self.reconcile_host_network(followed.as_ref().is_none_or(log_scan_error))
    }

    pub(super) fn rescan_kubepods(&mut self) -> Result<(), DatapathError> {
        let searched = self.kubepods.as_mut().map(Kubepods::search);
        self.reconcile_host_network(searched.as_ref().is_none_or(log_scan_error))
    }

    /// Restores the `host_network` hook. `all`: the known cgroups of Kubernetes pods are all that exist.
    pub(super) fn reconcile_host_network(&mut self, all: bool) -> Result<(), DatapathError> {
        // If no hierarchy was searched, other cgroups may exist: keep the links of an earlier agent.
        let all = all && self.kubepods.is_some();
        let none = BTreeSet::new();
        let cgroups = self.kubepods.as_ref().map_or(&none, |kubepods| &kubepods.found);
        let changes = self.datapath.restore_host_network(cgroups, all);
        self.report_cgroups(changes)?;
        let error = match &self.kubepods {
            // The datapath reports the cause.
            _ if self.datapath.lacks_identity(Hook::HostNetwork) => None,
            Some(kubepods) if kubepods.found.is_empty() => {
                let root = kubepods.root.display();
                Some(format!("no cgroup of Kubernetes pods (kubepods) below {root}"))
            }
            None if self.datapath.hooks().contains(Hook::HostNetwork) => {
                Some("no cgroup v2 hierarchy is mounted".to_owned())
            }
            Some(_) | None => None,
        };
        match (error, &self.no_kubepods) {
            (Some(error), None) => {
                log::warn!(
                    "hostNetwork pods are not restricted: {error}; {}",
                    kubepods::missing_kubepods_hint()
                );
                self.no_kubepods = Some(error);
            }
            (None, Some(_)) => self.no_kubepods = None,
            (Some(_), Some(_)) | (None, None) => {}
        }
        Ok(())
    }

    /// Logs changes on cgroups, and counts those that repair what another program changed.
    pub(super) fn report_cgroups(
        &mut self,
        changes: Result<Vec<CgroupChange>, DatapathError>,
    ) -> Result<(), DatapathError> {
        for CgroupChange { kind, is_new, text } in changes? {
            let level = if is_new { Level::Info } else { self.change_log_level() };
            let corrections = &mut self.corrections;
            let (level, counter) = match kind {
                CgroupChangeKind::Attached => (level, Some(&mut corrections.attached)),
                CgroupChangeKind::Replaced => (level, Some(&mut corrections.replaced)),
                CgroupChangeKind::Pinned => (level, Some(&mut corrections.pinned)),
                CgroupChangeKind::Reordered => (level, Some(&mut corrections.reordered)),
                CgroupChangeKind::Detached | CgroupChangeKind::Recovered => (Level::Info, None),
                CgroupChangeKind::Failed => (Level::Error, None),
            };
            if let Some(counter) = counter.filter(|_| level == Level::Warn) {
                *counter += 1;
            }
            log::log!(level, "{text}");
        }
        Ok(())
    }
}

/// Reports whether the cgroups could be read, and logs the error otherwise.
fn log_scan_error(scanned: &io::Result<()>) -> bool {
    if let Err(error) = scanned {
        log::error!("failed to search the cgroups of Kubernetes pods: {error}");
    }
    scanned.is_ok()
}
