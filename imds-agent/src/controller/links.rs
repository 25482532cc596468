//! Reconciliation of one interface: brings its attachments to the desired state.

use std::{collections::BTreeSet, time::Duration};

use imds_ebpf_common::{AttachMode, TcHook, TcHookSet};
use log::Level;
use tokio::time::{Instant, sleep_until};

use super::{
    Reconciler,
    attach_queue::AttachQueue,
    change_log::{Change, Pass},
};
use crate::{
    controller::plan::plan,
    datapath::{
        DatapathError,
        attach::attachment::{Action, Attachment, Order},
        maps::interface_records::LinkState,
        pin::dir::AttachPoint,
    },
    node::{
        interface_role::{self, Assignment, Uplinks},
        link::{Link, LinkKind},
    },
};

/// Time that Kubernetes has to name the pod behind a link. After that, a link of unknown use also gets the hook
/// `node_egress`.
const SPARE_DELAY: Duration = Duration::from_secs(10);

impl Reconciler {
    /// Returns the role and the desired hooks of an interface.
    pub(super) fn assign(&self, link: &Link) -> Assignment {
        interface_role::assign(link, &self.uplinks, &self.interfaces, self.pods.has_link(link.index))
    }

    /// Reads the routes again, and reconciles the interfaces whose role changed.
    pub(super) async fn reclassify(&mut self) -> Result<(), DatapathError> {
        self.routed = self.netlink.uplinks().await?;
        self.update_uplinks().await;
        self.follow_local_service().await
    }

    /// Recomputes the uplinks among the known interfaces, and reconciles the interfaces whose role or hooks changed.
    pub(super) async fn update_uplinks(&mut self) {
        let uplinks = Uplinks::new(self.routed.clone(), self.links.values());
        if uplinks == self.uplinks {
            return;
        }
        let before = std::mem::replace(&mut self.uplinks, uplinks);
        let is_changed = |link: &&Link| {
            before.contain(link.index) != self.uplinks.contain(link.index)
                || before.are_routed(link.index) != self.uplinks.are_routed(link.index)
        };
        let changed: Vec<_> = self.links.values().filter(is_changed).cloned().collect();
        for link in changed {
            self.reconcile_link(link).await;
        }
    }

    /// Attaches the sendmsg programs while an interface lacks a desired program, and detaches them otherwise.
    pub(super) fn follow_enforcement(&mut self) -> Result<(), DatapathError> {
        let changes = self.datapath.set_enforced(self.errors.is_empty())?;
        self.report_cgroups(changes);
        Ok(())
    }

    /// Waits for the turn of the next attachment in the queue.
    pub async fn attachment_due(&self) -> AttachPoint {
        match self.queue.next().into_iter().chain(self.backoff.first_retry()).min_by_key(|&(_, due)| due) {
            Some((point, due)) => {
                sleep_until(due).await;
                point
            }
            None => std::future::pending().await,
        }
    }

    /// Makes an attachment whose turn has come.
    pub async fn attach(&mut self, point: AttachPoint) {
        let is_queued = self.queue.contains(point);
        self.queue.remove(point);
        // A repair that is still too early is postponed again.
        self.backoff.clear(point);
        if let Some(link) = self.links.get(&point.ifindex).cloned() {
            self.turn = Some(point).filter(|_| is_queued);
            self.reconcile_link(link).await;
            self.turn = None;
            // If no node-wide hook is on, no hook denies the packets of waiting pods: do not pause.
            if self.datapath.has_node_wide_hook() {
                self.queue.on_attached();
            }
        }
        self.set_ready();
    }

    /// Makes all attachments of the queue without waiting.
    pub async fn attach_all(&mut self) {
        while let Some((point, _)) = self.queue.next() {
            self.attach(point).await;
        }
    }

    /// Lets `status` know that the initial sync is done, once each pod that was there at the start has its program.
    pub(super) fn set_ready(&mut self) {
        if !self.initial_sync_done {
            return;
        }
        self.initial.retain(|point| self.queue.contains(*point));
        if !self.initial.is_empty() || std::mem::replace(&mut self.is_ready, true) {
            return;
        }
        self.changes.end(Pass::InitialSync);
        if let Err(error) = self.datapath.set_ready() {
            self.is_ready = false;
            log::error!("failed to mark the agent as ready: {:#}", anyhow::Error::from(error));
        }
    }

    /// Releases attachments that wait for a CNI plugin once a process runs in the pod's network namespace: the
    /// container runtime starts the first process after all plugins have finished.
    pub(super) async fn release_started_pods(&mut self) {
        let delayed: BTreeSet<u32> = self.queue.delayed().collect();
        if delayed.is_empty() {
            return;
        }
        let ids = self.resolver.inhabited(&self.netlink).await;
        let links = &self.links;
        let is_started = |ifindex: u32| {
            let id = links.get(&ifindex).and_then(|link| link.peer_netns);
            id.is_some_and(|id| ids.contains(&id))
        };
        self.queue.release(is_started);
    }

    /// Reports whether attachments wait for a CNI plugin.
    pub(super) fn waits_for_plugins(&self) -> bool {
        self.queue.delayed().next().is_some()
    }

    pub(super) async fn reconcile_link(&mut self, link: Link) {
        let is_new = self.links.insert(link.index, link.clone()).is_none();
        if is_new {
            self.pods.on_link_added(&link);
        }
        match self.reconcile(&link, is_new).await {
            Ok(Reconciled::AsDesired) => {
                if self.errors.remove(&link.index).is_some() {
                    let text = format!("{} (ifindex {}): enforced again", link.name, link.index);
                    self.changes.note(Level::Info, Change::EnforcedAgain, text);
                }
            }
            Ok(Reconciled::Postponed) => {
                let error = "another program undoes repairs again and again: the next repair waits";
                self.fail(&link, error.to_owned());
            }
            Ok(Reconciled::Yielded) => {
                self.errors.insert(link.index, "another imds-agent has its filter there".to_owned());
            }
            // RTM_DELLINK follows.
            Err(error) if error.is_interface_gone() => {
                log::debug!("{} (ifindex {}): deleted during reconciliation", link.name, link.index);
            }
            Err(error) => self.fail(&link, format!("{:#}", anyhow::Error::from(error))),
        }
    }

    fn fail(&mut self, link: &Link, error: String) {
        if self.errors.get(&link.index) != Some(&error) {
            let text = format!("{} (ifindex {}): not enforced: {error}", link.name, link.index);
            self.changes.note(Level::Error, Change::NotEnforced, text);
            self.errors.insert(link.index, error);
        }
    }

    async fn reconcile(&mut self, link: &Link, is_new: bool) -> Result<Reconciled, DatapathError> {
        let mut observed = Vec::new();
        for hook in TcHook::ALL {
            observed.push((hook, self.datapath.observe(link, hook, !self.initial_sync_done).await?));
        }
        // A record that cannot be written, for example because a map is full, must not prevent the attachment.
        let mut recorded = Ok(());
        // The exemptions under this index belong to this link if an earlier agent ended before the link had its turn.
        let was_queued = self.retain_previous_grants && self.datapath.was_pending(link);
        if is_new && !was_queued && observed.iter().all(|(_, attachments)| attachments.is_empty()) {
            // Otherwise records and counters under this index belong to a deleted interface.
            recorded = self.datapath.claim_ifindex(link);
        }
        let mut assignment = self.assign(link);
        let has_node_egress =
            observed.iter().any(|(hook, attachments)| *hook == TcHook::NodeEgress && !attachments.is_empty());
        if link.leads_elsewhere() && has_node_egress {
            // Detaching the hook from a link that turns out to be a pod's would take RTNL without need.
            assignment.hooks = interface_role::assign(link, &self.uplinks, &self.interfaces, false).hooks;
        }
        // Desired programs are attached before others are detached.
        observed.sort_by_key(|(hook, _)| !assignment.hooks.has(*hook));
        let mut state = LinkState { assignment, attach_modes: [AttachMode::None; 2], is_pending: false };
        let (mut failed, mut reconciled) = (None, Reconciled::AsDesired);
        for (hook, attachments) in observed {
            let point = AttachPoint { ifindex: link.index, hook: hook };
            let desired = self.datapath.desired_mode(link, assignment.hooks, hook);
            let is_lost = attachments.is_empty() && desired != AttachMode::None && self.turn != Some(point);
            if hook == TcHook::FromPod && is_lost && !was_queued && !self.queue.contains(point) {
                // No program of the agent is there: the exemptions of this index may belong to a deleted interface.
                recorded = recorded.and(self.datapath.revoke(link.index));
                self.exemptions_dirty = true;
            }
            if self.must_wait(link, point, desired, &attachments).await? {
                state.is_pending = true;
                state.set_mode(hook, observed_mode(&attachments));
                continue;
            }
            self.queue.remove(point);
            let result = self.reconcile_hook(link, (hook, desired), &attachments, is_new).await;
            if matches!(result, Ok(Reconciled::AsDesired)) {
                self.failed.remove(&point);
            } else {
                self.failed.insert(point);
            }
            match result {
                Ok(Reconciled::AsDesired) => state.set_mode(hook, desired),
                Ok(postponed @ (Reconciled::Postponed | Reconciled::Yielded)) => {
                    state.set_mode(hook, observed_mode(&attachments));
                    reconciled = postponed;
                }
                // The hook only prepares this link for a route to an endpoint, so an obstacle is not an error.
                Err(error) if self.is_spare(link, point) && error.obstacle().is_some() => {
                    log::debug!("{} (ifindex {}): {:#}", link.name, link.index, anyhow::Error::from(error));
                    state.assignment.hooks = TcHookSet::FROM_POD;
                }
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        let mut recorded = recorded.and(self.datapath.record(link, state));
        if let Some(peer) =
            link.lower.filter(|_| link.is_internal_pair()).and_then(|peer| self.links.get(&peer))
        {
            recorded = recorded.and(self.datapath.update_own_packets(peer));
        }
        failed.map_or(recorded.map(|()| reconciled), Err)
    }

    async fn reconcile_hook(
        &mut self,
        link: &Link,
        (hook, desired): (TcHook, AttachMode),
        attachments: &[Attachment],
        is_new: bool,
    ) -> Result<Reconciled, DatapathError> {
        let point = AttachPoint { ifindex: link.index, hook: hook };
        let mut actions = plan(desired, attachments);
        if actions.is_empty() {
            self.backoff.clear(point);
        }
        let yields = self.yield_to_earlier(&mut actions);
        let is_missing = actions.iter().any(|action| matches!(action, Action::Attach(_)));
        if self.is_repair(point, &actions, is_new) && !self.backoff.allow(point, is_missing, Instant::now()) {
            log::debug!("{} (ifindex {}): repair of {} postponed", link.name, link.index, hook.hook().name());
            return Ok(Reconciled::Postponed);
        }
        for &action in &actions {
            self.datapath.apply(link, hook, action).await?;
            self.report(link, hook, action, is_new);
        }
        let is_moved = |action: &Action| matches!(action, Action::Attach(_) | Action::Reorder(_));
        if desired == AttachMode::Clsact && actions.iter().any(is_moved) {
            self.warn_if_blocked(link, hook).await?;
        }
        Ok(if yields { Reconciled::Yielded } else { Reconciled::AsDesired })
    }

    /// Reports whether the actions undo a change that another program made.
    fn is_repair(&self, point: AttachPoint, actions: &[Action], is_new: bool) -> bool {
        let has_failed = self.failed.contains(&point) && self.backoff.next_retry(point).is_none();
        let is_expected =
            is_new || has_failed || self.in_reload || !self.initial_sync_done || self.turn == Some(point);
        let is_repair = |action: &Action| !matches!(action, Action::Detach(_) | Action::Pin(_));
        !is_expected && actions.iter().any(is_repair)
    }

    /// Reports whether an attachment has to wait for its turn, and queues it.
    ///
    /// Attachments to uplinks and to interfaces other than veth and netkit never wait. In clsact mode the first filter
    /// needs a qdisc, and a CNI plugin (`bandwidth`) may want to add its own: the link waits until its plugins have
    /// finished.
    async fn must_wait(
        &mut self,
        link: &Link,
        point: AttachPoint,
        desired: AttachMode,
        attachments: &[Attachment],
    ) -> Result<bool, DatapathError> {
        let is_attached = attachments.iter().any(|attachment| attachment.backend == desired);
        let is_uplink = point.hook == TcHook::NodeEgress && self.uplinks.contain(link.index);
        // The kernel announces a pair that a CNI plugin creates before its peer is known.
        let is_pair = link.leads_elsewhere() || matches!(link.kind, LinkKind::Veth | LinkKind::Netkit);
        // An attachment that failed in its turn is retried with each event and resync.
        let has_failed = self.failed.contains(&point);
        // A program that another program removed is attached again immediately. [`RepairBackoff`] limits repetitions.
        let was_attached = self.initial_sync_done && self.datapath.was_attached(link, point.hook);
        let is_turn = self.turn == Some(point) || has_failed || was_attached;
        if desired == AttachMode::None || is_attached || is_uplink || !is_pair || is_turn {
            return Ok(false);
        }
        let is_clsact = desired == AttachMode::Clsact && !self.clsact_delay.is_zero();
        let waits_for_plugin = is_clsact && !self.datapath.has_qdisc(link).await?;
        let now = Instant::now();
        if waits_for_plugin {
            self.queue.push(point, now + self.clsact_delay);
        } else if self.is_spare(link, point) && self.pods.is_enabled() {
            self.queue.push_spare(point, now + SPARE_DELAY);
        } else {
            self.queue.push(point, now);
        }
        if is_clsact && !waits_for_plugin {
            self.queue.release(|ifindex| ifindex == link.index);
        }
        Ok(true)
    }

    /// Reports whether `node_egress` on this link is only a precaution: no route to an endpoint uses the link yet.
    fn is_spare(&self, link: &Link, point: AttachPoint) -> bool {
        point.hook == TcHook::NodeEgress && link.leads_elsewhere() && !self.uplinks.contain(link.index)
    }

    /// Returns the log level of a change: `info` during a reload and the initial sync, otherwise `warn`, because
    /// another program caused the change.
    pub(super) fn change_log_level(&self) -> Level {
        if self.in_reload || !self.initial_sync_done { Level::Info } else { Level::Warn }
    }

    async fn warn_if_blocked(&mut self, link: &Link, hook: TcHook) -> Result<(), DatapathError> {
        let attachments = self.datapath.observe(link, hook, false).await?;
        if attachments.iter().any(|attachment| attachment.place == Order::Blocked) {
            let Link { name, index, .. } = link;
            log::warn!(
                "{name} (ifindex {index}): another filter runs before {}: see `tc filter show dev {name} ingress` or \
                 `egress`",
                hook.hook().name()
            );
        }
        Ok(())
    }

    pub(super) fn on_link_deleted(&mut self, index: u32) {
        self.pods.on_link_deleted(index);
        self.queue.remove_link(index);
        self.backoff.remove_link(index);
        self.failed.retain(|point| point.ifindex != index);
        if let Some(link) = self.links.remove(&index) {
            let text = format!("{} (ifindex {index}) was deleted", link.name);
            self.changes.note(Level::Info, Change::Deleted, text);
        }
        self.errors.remove(&index);
        if let Err(error) = self.datapath.remove_interface(index) {
            let error = anyhow::Error::from(error);
            log::error!("failed to clean up state of deleted interface {index}: {error:#}");
        }
    }
}

/// Result of a reconciliation that met no error.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Reconciled {
    /// Each hook is as desired, or waits for its turn in the attach queue.
    AsDesired,
    /// A repair is postponed because another program undid it repeatedly.
    Postponed,
    /// Another agent that started earlier has its filter on the hook.
    Yielded,
}

/// Returns the attach mode of the agent's program at a hook, or `None` if it has none.
fn observed_mode(attachments: &[Attachment]) -> AttachMode {
    attachments.first().map_or(AttachMode::None, |attachment| attachment.backend)
}

/// Returns the attachments that the initial sync still waits for.
pub(super) fn initial(queue: &AttachQueue) -> BTreeSet<AttachPoint> {
    queue.initial().collect()
}
