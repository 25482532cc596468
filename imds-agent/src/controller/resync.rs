//! Resync: repairs changes that no event reported.

use std::collections::BTreeSet;

use super::{Reconciler, change_log::Pass, links, log_if_preexisting};
use crate::{
    datapath::DatapathError,
    node::{interface_role::Uplinks, link::Link},
};

/// Links to reconcile before events are handled again: about 1 ms of work.
const LINK_BATCH: usize = 8;

impl Reconciler {
    /// Starts a resync of attachments and pins. [`Reconciler::resync_step`] then reconciles a few links at a time, so that events
    /// need not wait for all of them. A full resync also lists interfaces and routes, although the kernel reports
    /// their changes.
    pub async fn start_resync(&mut self, full: bool) -> Result<(), DatapathError> {
        if self.resync_in_progress() {
            return Ok(());
        }
        self.changes.begin(Pass::Resync);
        let begun = self.begin_resync(full).await;
        if !self.resync_in_progress() {
            self.changes.end(Pass::Resync);
        }
        begun
    }

    async fn begin_resync(&mut self, full: bool) -> Result<(), DatapathError> {
        if full {
            log_if_preexisting(true, self.datapath.retry_rejected())?;
        }
        let begun = self.reconcile_node();
        if full {
            self.find_other_agents();
            self.resolver.refresh();
            for link in self.read_links().await? {
                if self.links.get(&link.index) != Some(&link) {
                    self.reconcile_link(link).await;
                }
            }
            self.update_uplinks().await;
            self.follow_local_service().await?;
        }
        self.resync_queue = self.links.keys().copied().collect();
        begun
    }

    /// Reports whether a resync is in progress.
    #[must_use]
    pub fn resync_in_progress(&self) -> bool {
        !self.resync_queue.is_empty()
    }

    /// Reconciles the next links of the resync.
    pub async fn resync_step(&mut self) -> Result<(), DatapathError> {
        for _ in 0..LINK_BATCH {
            let Some(index) = self.resync_queue.pop_front() else { break };
            if let Some(link) = self.links.get(&index).cloned() {
                self.reconcile_link(link).await;
            }
        }
        if self.resync_in_progress() {
            return Ok(());
        }
        self.changes.end(Pass::Resync);
        self.follow_enforcement()?;
        self.restore_exemptions().await?;
        // Mark the agent as ready again, in case another program removed the pin directory.
        if self.is_ready { self.datapath.set_ready() } else { Ok(()) }
    }

    /// Does a full resync. An error on one interface is recorded in [`Reconciler::errors`], and does not keep the others
    /// from being reconciled.
    pub(super) async fn resync(&mut self) -> Result<(), DatapathError> {
        self.changes.begin(Pass::Resync);
        self.find_other_agents();
        // Enforcement continues without pins: the error is logged at the end.
        let around = self.reconcile_node().and(self.follow_local_service().await);
        // Node-wide hooks come first: they cover all pods at once, and their attachments do not wait.
        let mut links = self.read_links().await?;
        self.uplinks = Uplinks::new(self.routed.clone(), links.iter());
        links.sort_by_key(|link| (link.leads_elsewhere(), !self.uplinks.contain(link.index)));
        for link in links {
            self.reconcile_link(link).await;
        }
        self.resolve_sandboxes(usize::MAX).await;
        // A failure to exempt some pods must not keep the agent from denying the others.
        log_if_preexisting(true, self.restore_exemptions().await)?;
        if !std::mem::replace(&mut self.initial_sync_done, true) {
            self.initial = links::initial(&self.queue);
            self.set_ready();
        }
        self.changes.end(Pass::Resync);
        // An agent that runs with the remaining hooks is better than none. The next resync tries again.
        log_if_preexisting(true, around.and(self.follow_enforcement()))
    }

    /// Resyncs everything except links: pins, socket hook and cgroups.
    fn reconcile_node(&mut self) -> Result<(), DatapathError> {
        let restored = self.datapath.restore_pins();
        if let Ok(true) = restored
            && self.initial_sync_done
        {
            self.corrections.pinned += 1;
            log::warn!("restored missing entries of {}", self.datapath.pins().root().display());
        }
        // Programs that are attached below read this map.
        let node_allow = self.restore_node_allow();
        let sockets = self.restore_sockets();
        self.datapath.forget_granted();
        self.pods.retry();
        let hosts = self.search_kubepods();
        restored?;
        node_allow?;
        sockets?;
        hosts
    }

    /// Lists the links of the node, and removes the state of deleted ones.
    async fn read_links(&mut self) -> Result<Vec<Link>, DatapathError> {
        self.routed = self.netlink.uplinks().await?;
        let links = self.netlink.links().await?;
        let present: BTreeSet<u32> = links.iter().map(|link| link.index).collect();
        let known = self.links.keys().copied().chain(self.datapath.known());
        for gone in known.filter(|index| !present.contains(index)).collect::<BTreeSet<_>>() {
            self.on_link_deleted(gone);
        }
        Ok(links)
    }
}
