//! hostNetwork restriction: follows the cgroups of Kubernetes pods as they are created and removed.

use std::{collections::BTreeSet, io};

use imds_ebpf_common::Hook;

use super::Reconciler;
use crate::{
    datapath::DatapathError,
    node::kubepods::{self, Kubepods},
};

impl Reconciler {
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
        let cgroups = self.kubepods.as_ref().map_or(&none, Kubepods::found);
        let changes = self.datapath.restore_host_network(cgroups, all)?;
        self.report_cgroups(changes);
        let error = match &self.kubepods {
            // The datapath reports the cause.
            _ if self.datapath.lacks_identity(Hook::HostNetwork) => None,
            Some(kubepods) if kubepods.found().is_empty() => {
                let root = kubepods.root().display();
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
}

/// Reports whether the cgroups could be read, and logs the error otherwise.
fn log_scan_error(scanned: &io::Result<()>) -> bool {
    if let Err(error) = scanned {
        log::error!("failed to search the cgroups of Kubernetes pods: {error}");
    }
    scanned.is_ok()
}
