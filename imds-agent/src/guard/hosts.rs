//! Strict mode: the cgroups of Kubernetes pods, as they come and go.

use std::{collections::BTreeSet, io};

use super::Guard;
use crate::{
    datapath::DatapathError,
    node::kubepods::{self, Kubepods},
};

impl Guard {
    /// Waits until the cgroups of Kubernetes pods may have changed.
    pub async fn kubepods_changed(&self) {
        match &self.kubepods {
            Some(kubepods) => kubepods.changed().await,
            None => std::future::pending().await,
        }
    }

    /// Takes in what changed of them.
    pub fn follow_kubepods(&mut self) -> Result<(), DatapathError> {
        let followed = self.kubepods.as_mut().map(Kubepods::follow);
        self.restore_hosts(followed.as_ref().is_none_or(was_seen))
    }

    pub(super) fn search_kubepods(&mut self) -> Result<(), DatapathError> {
        let searched = self.kubepods.as_mut().map(Kubepods::search);
        self.restore_hosts(searched.as_ref().is_none_or(was_seen))
    }

    /// `all`: whether what is known of them is all there is.
    pub(super) fn restore_hosts(&mut self, all: bool) -> Result<(), DatapathError> {
        let none = BTreeSet::new();
        let cgroups = self.kubepods.as_ref().map_or(&none, Kubepods::found);
        let changes = self.datapath.restore_hosts(cgroups, all)?;
        self.report_cgroups(changes);
        let root = self.kubepods.as_ref().filter(|kubepods| kubepods.found().is_empty()).map(Kubepods::root);
        match (root, &self.no_kubepods) {
            (Some(root), None) => {
                let failure = format!("no cgroup of Kubernetes pods (kubepods) below {}", root.display());
                log::warn!("hostNetwork pods are not restricted: {failure}; {}", kubepods::why_none());
                self.no_kubepods = Some(failure);
            }
            (None, Some(_)) => self.no_kubepods = None,
            (Some(_), Some(_)) | (None, None) => {}
        }
        Ok(())
    }
}

/// Whether the cgroups were looked at; where not, says why.
fn was_seen(looked: &io::Result<()>) -> bool {
    if let Err(error) = looked {
        log::error!("can't look for the cgroups of Kubernetes pods: {error}");
    }
    looked.is_ok()
}
