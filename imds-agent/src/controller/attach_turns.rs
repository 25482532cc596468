//! Turns of the attachments in the queue.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use imds_ebpf_common::{AttachMode, TcHook};
use tokio::time::{Instant, sleep_until};

use super::{Reconciler, attach_queue::AttachQueue, change_log::Pass, repair_backoff::RepairBackoff};
use crate::{
    datapath::{DatapathError, attach::attachment::Attachment, pin::dir::AttachPoint},
    node::link::{Link, LinkKind},
};

/// Time that Kubernetes has to name the pod behind a link. After that, a link of unknown use also gets the hook
/// `node_egress`.
const OPTIONAL_DELAY: Duration = Duration::from_secs(10);

/// Attachments that wait, and those that failed.
pub(super) struct AttachState {
    /// Attachments that wait for their turn.
    pub(super) queue: AttachQueue,
    /// Attachment whose turn it is.
    pub(super) turn: Option<AttachPoint>,
    /// Attachments of the initial sync that wait for their turn.
    pub(super) initial: BTreeSet<AttachPoint>,
    /// Hooks that have had the agent's program since the start or the last detachment: if it is missing, another program
    /// has removed it.
    pub(super) attached: BTreeSet<AttachPoint>,
    /// Hooks that could not be reconciled the last time.
    pub(super) failed: BTreeSet<AttachPoint>,
    /// Backoff of repairs that another program undoes repeatedly.
    pub(super) backoff: RepairBackoff,
    /// Time that a new link of a pod waits for its CNI plugins before it gets a qdisc.
    pub(super) clsact_delay: Duration,
}

impl AttachState {
    /// Returns the state before any link is known.
    pub(super) fn new() -> Self {
        Self {
            queue: AttachQueue::new(),
            turn: None,
            initial: BTreeSet::new(),
            attached: BTreeSet::new(),
            failed: BTreeSet::new(),
            backoff: RepairBackoff::default(),
            clsact_delay: Duration::ZERO,
        }
    }
}

impl Reconciler {
    /// Waits for the turn of the next attachment in the queue.
    pub async fn attachment_due(&self) -> AttachPoint {
        let retry = self.attaching.backoff.first_retry();
        match self.attaching.queue.next().into_iter().chain(retry).min_by_key(|&(_, due)| due) {
            Some((point, due)) => {
                sleep_until(due).await;
                point
            }
            None => std::future::pending().await,
        }
    }

    /// Makes an attachment whose turn has come.
    pub async fn attach(&mut self, point: AttachPoint) {
        let is_queued = self.attaching.queue.contains(point);
        self.attaching.queue.remove(point);
        // A repair that is still too early is postponed again.
        self.attaching.backoff.clear(point);
        if let Some(link) = self.node.links.get(&point.ifindex).cloned() {
            self.attaching.turn = Some(point).filter(|_| is_queued);
            self.reconcile_link(link).await;
            self.attaching.turn = None;
            // If no node-wide hook is on, no hook denies the packets of waiting pods: do not pause.
            if self.datapath.has_node_wide_hook() {
                self.attaching.queue.on_attached();
            }
        }
        self.set_ready();
    }

    /// Makes all attachments of the queue without waiting.
    pub async fn attach_all(&mut self) {
        while let Some((point, _)) = self.attaching.queue.next() {
            self.attach(point).await;
        }
    }

    /// Lets `status` know that the initial sync is done, once each pod that was there at the start has its program.
    pub(super) fn set_ready(&mut self) {
        if !self.progress.initial_sync_done || self.progress.is_ready {
            return;
        }
        let left: BTreeSet<_> = self.attaching.queue.initial().collect();
        self.attaching.initial.retain(|point| left.contains(point));
        if !self.attaching.initial.is_empty() {
            return;
        }
        self.changes.end(Pass::InitialSync);
        match self.datapath.set_ready() {
            Ok(()) => self.progress.is_ready = true,
            Err(error) => log::error!("failed to mark the agent as ready: {:#}", anyhow::Error::from(error)),
        }
    }

    /// Reports whether each pod that was there at the start has its program.
    pub fn is_ready(&self) -> bool {
        self.progress.is_ready
    }

    /// Releases attachments that wait for a CNI plugin once the plugins have finished. Most container runtimes start the
    /// first process of a pod after them. A process that is older than the link shows that the runtime does not
    /// (cri-dockerd): such a link waits for the whole delay if another hook denies the pod's packets.
    pub(super) async fn release_started_pods(&mut self) {
        let netns = |ifindex| self.node.links.get(&ifindex).and_then(|link| link.peer_netns);
        let delayed = self.attaching.queue.delayed();
        let delayed: BTreeMap<u32, (i32, Instant)> =
            delayed.filter_map(|(ifindex, since)| Some((ifindex, (netns(ifindex)?, since)))).collect();
        if delayed.is_empty() {
            return;
        }
        let namespaces = delayed.values().map(|&(id, _)| id).collect();
        let starts = self.exemptions.resolver.container_starts(&self.netlink, &namespaces).await;
        // The plugins of links that exist at the start have probably finished.
        let initial: BTreeSet<u32> = self.attaching.initial.iter().map(|point| point.ifindex).collect();
        let is_denied = self.datapath.has_node_wide_hook();
        self.attaching.queue.release(|ifindex| {
            delayed.get(&ifindex).is_some_and(|(id, since)| {
                let may_wait = is_denied && !initial.contains(&ifindex);
                starts.get(id).is_some_and(|start| start > since || !may_wait)
            })
        });
    }

    /// Reports whether an attachment has to wait for its turn, and queues it.
    ///
    /// Attachments to uplinks and to interfaces other than veth and netkit never wait, except for ports of an uplink whose
    /// peer is in another network namespace: pods may use the bridge of the NIC. In clsact mode the first filter needs a
    /// qdisc, and a CNI plugin (`bandwidth`) may want to add its own: the link waits until its plugins have finished.
    pub(super) async fn must_wait(
        &mut self,
        link: &Link,
        point: AttachPoint,
        desired: AttachMode,
        attachments: &[Attachment],
    ) -> Result<bool, DatapathError> {
        let is_attached = attachments.iter().any(|attachment| attachment.backend == desired);
        let is_uplink = point.hook == TcHook::NodeEgress && self.node.is_exit(link);
        // The kernel announces a pair that a CNI plugin creates before its peer is known.
        let is_pair = link.leads_elsewhere() || matches!(link.kind, LinkKind::Veth | LinkKind::Netkit);
        // An attachment that failed in its turn is retried with each event and resync.
        let has_failed = self.attaching.failed.contains(&point);
        // A program that another program removed is attached again immediately. [`RepairBackoff`] limits repetitions.
        let was_attached = self.progress.initial_sync_done && self.datapath.was_attached(link, point.hook);
        let is_turn = self.attaching.turn == Some(point) || has_failed || was_attached;
        if desired == AttachMode::None || is_attached || is_uplink || !is_pair || is_turn {
            return Ok(false);
        }
        let is_clsact = desired == AttachMode::Clsact && !self.attaching.clsact_delay.is_zero();
        let waits_for_plugin = is_clsact && !self.datapath.has_qdisc(link).await?;
        let is_optional =
            self.node.uplinks.is_optional(link, point.hook) && self.exemptions.pods.is_enabled();
        let (delay, is_optional) = match (waits_for_plugin, is_optional) {
            (true, _) => (self.attaching.clsact_delay, false),
            (false, true) => (OPTIONAL_DELAY, true),
            (false, false) => (Duration::ZERO, false),
        };
        if waits_for_plugin && !self.attaching.queue.contains(point) {
            let Link { name, index, .. } = link;
            log::debug!("waiting up to {delay:?} for the CNI plugins of {name} (ifindex {index})");
        }
        self.attaching.queue.push(point, Instant::now() + delay, is_optional);
        if is_clsact && !waits_for_plugin {
            self.attaching.queue.release(|ifindex| ifindex == link.index);
        }
        Ok(true)
    }
}
