//! Resync: repairs changes that no event reported.

use std::collections::{BTreeSet, VecDeque};

use super::{Reconciler, change_log::Pass, log_if_preexisting, requested_resync::RequestedResync};
use crate::{
    datapath::DatapathError,
    node::{
        interface_role::Uplinks,
        link::{self, Link},
    },
};

/// Links to reconcile before events are handled again: about 1 ms of work.
const LINK_BATCH: usize = 8;

/// Progress of the initial sync, of a resync and of a reload.
#[derive(Debug, Default)]
pub(super) struct SyncProgress {
    /// True once every interface was reconciled: until then, filters of an earlier agent may be anywhere.
    pub(super) initial_sync_done: bool,
    /// `status` knows that the initial sync is done.
    pub(super) is_ready: bool,
    /// True while a reload of the configuration causes the changes.
    pub(super) in_reload: bool,
    /// Interfaces that the current resync still has to reconcile.
    pub(super) resync_queue: VecDeque<u32>,
    /// Full resync that lost events or an error made necessary.
    pub(super) requested: RequestedResync,
}

impl Reconciler {
    /// Starts a resync of attachments and pins. [`Reconciler::resync_step`] then reconciles a few links at a time, so that
    /// events need not wait for all of them. A full resync also lists interfaces and routes, although the kernel reports
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
        let listed = if full { self.relist().await } else { Ok(()) };
        self.progress.resync_queue = self.node.links.keys().copied().collect();
        begun.and(listed)
    }

    /// Lists interfaces and routes again, and reconciles those that differ from what events reported.
    async fn relist(&mut self) -> Result<(), DatapathError> {
        self.find_other_agents();
        self.exemptions.resolver.refresh();
        let links = self.read_links().await;
        for link in self.progress.requested.request_after(links)? {
            if self.node.links.get(&link.index) != Some(&link) {
                self.reconcile_link(link).await;
            }
        }
        self.update_uplinks().await;
        self.reconcile_local_service().await
    }

    /// Does the requested full resync. If it fails, it is requested again.
    pub async fn run_requested_resync(&mut self) -> Result<(), DatapathError> {
        let result = self.resync().await;
        self.progress.requested.end();
        self.progress.requested.request_after(result)
    }

    /// Reports whether a resync is in progress.
    pub fn resync_in_progress(&self) -> bool {
        !self.progress.resync_queue.is_empty()
    }

    /// Reconciles the next links of the resync.
    pub async fn resync_step(&mut self) -> Result<(), DatapathError> {
        for _ in 0..LINK_BATCH {
            let Some(index) = self.progress.resync_queue.pop_front() else { break };
            if let Some(link) = self.node.links.get(&index).cloned() {
                self.reconcile_link(link).await;
            }
        }
        if self.resync_in_progress() {
            return Ok(());
        }
        self.changes.end(Pass::Resync);
        self.reconcile_sendmsg()?;
        self.reconcile_exemptions().await?;
        // Mark the agent as ready again, in case another program removed the pin directory.
        if self.progress.is_ready { self.datapath.set_ready() } else { Ok(()) }
    }

    /// Does a full resync. An error on one interface is recorded in [`Reconciler::errors`], and does not keep the others
    /// from being reconciled.
    pub(super) async fn resync(&mut self) -> Result<(), DatapathError> {
        self.changes.begin(Pass::Resync);
        self.find_other_agents();
        // Enforcement continues without pins: the error is logged at the end.
        let of_node = self.reconcile_node().and(self.reconcile_local_service().await);
        // Node-wide hooks come first: they cover all pods at once, and their attachments do not wait.
        let mut links = self.read_links().await?;
        self.node.uplinks = Uplinks::new(&self.node.routes, links.iter());
        // An event that was lost may have connected another pod to an interface of a sandbox.
        self.exemptions.pods.drop_sandboxes();
        // The record of a device that returns packets comes before the hook of the uplink to which it returns them.
        links.sort_by_key(|link| {
            let is_uplink = self.node.uplinks.contain(link.index);
            (link.leads_elsewhere(), !link.may_return_packets(), !is_uplink)
        });
        if !self.progress.initial_sync_done && links.iter().any(Link::may_return_packets) {
            log_if_preexisting(true, self.add_node_sources())?;
        }
        for link in links {
            self.reconcile_link(link).await;
        }
        self.resolve_sandboxes(usize::MAX).await;
        // A failure to exempt some pods must not keep the agent from denying the others.
        log_if_preexisting(true, self.reconcile_exemptions().await)?;
        if !std::mem::replace(&mut self.progress.initial_sync_done, true) {
            self.attaching.initial = self.attaching.queue.initial().collect();
            self.set_ready();
        }
        self.changes.end(Pass::Resync);
        // An agent that runs with the remaining hooks is better than none. The next resync tries again.
        log_if_preexisting(true, of_node.and(self.reconcile_sendmsg()))
    }

    /// Resyncs everything except links: pins, socket hook and cgroups.
    fn reconcile_node(&mut self) -> Result<(), DatapathError> {
        let restored = self.datapath.restore_pins();
        if let Ok(true) = restored
            && self.progress.initial_sync_done
        {
            self.corrections.pinned += 1;
            log::warn!("restored missing pins and directories in {}", self.datapath.pins().root().display());
        }
        // Programs that are attached below read this map.
        let node_allow = self.reconcile_node_allow();
        let sockets = self.reconcile_sockets();
        self.datapath.invalidate_exemptions();
        self.exemptions.pods.retry();
        // A pod may get an address late (DHCP, IPv6 autoconfiguration), and the kernel reports no change in other network
        // namespaces.
        self.exemptions.pods.enqueue_exempt(self.exemptions.rules.pod_selectors());
        let hosts = self.rescan_kubepods();
        restored?;
        node_allow?;
        sockets?;
        hosts
    }

    /// Lists the links of the node, and removes the state of deleted ones.
    async fn read_links(&mut self) -> Result<Vec<Link>, DatapathError> {
        self.node.routes = self.netlink.endpoint_routes().await?;
        let links = self.netlink.links().await?;
        let present: BTreeSet<u32> = links.iter().map(|link| link.index).collect();
        let known = self.node.links.keys().copied().chain(self.datapath.recorded_ifindexes());
        let missing: BTreeSet<_> = known.filter(|index| !present.contains(index)).collect();
        // A dump may leave out an interface if others are deleted at that moment.
        for gone in missing.into_iter().filter(|&index| link::is_deleted(index)) {
            self.on_link_deleted(gone);
        }
        Ok(links)
    }
}
