//! Reconciliation of one interface: brings its attachments to the desired state.

use imds_ebpf_common::{AttachMode, TcHook, TcHookSet};
use log::Level;
use tokio::time::Instant;

use super::{Reconciler, change_log::Change};
use crate::{
    controller::plan::plan,
    datapath::{
        DatapathError,
        attach::attachment::{Action, Attachment, Order},
        maps::interface_records::LinkState,
        pin::dir::AttachPoint,
    },
    node::{
        interface_role::{self, Assignment},
        link::Link,
    },
};

impl Reconciler {
    /// Returns the role and the desired hooks of an interface.
    pub(super) fn assign(&self, link: &Link) -> Assignment {
        interface_role::assign(
            link,
            &self.node.uplinks,
            &self.interfaces,
            self.exemptions.pods.has_link(link.index),
        )
    }

    /// Reads the routes again, and reconciles the interfaces whose role changed.
    pub(super) async fn reclassify(&mut self) -> Result<(), DatapathError> {
        let routes = self.netlink.endpoint_routes().await;
        self.node.routes = self.progress.requested.request_after(routes)?;
        self.update_uplinks().await;
        self.reconcile_local_service().await
    }

    /// Recomputes the uplinks among the known interfaces, and reconciles the interfaces whose role or hooks changed.
    pub(super) async fn update_uplinks(&mut self) {
        for link in self.node.update_uplinks() {
            self.reconcile_link(link).await;
        }
    }

    pub(super) async fn reconcile_link(&mut self, link: Link) {
        let is_new = self.node.links.insert(link.index, link.clone()).is_none();
        if is_new {
            self.exemptions.pods.on_link_added(&link);
        }
        match self.reconcile(&link, is_new).await {
            Ok(Reconciled::AsDesired) => {
                if self.node.errors.remove(&link.index).is_some() {
                    let text = format!("{} (ifindex {}): enforced again", link.name, link.index);
                    self.changes.log_change(Level::Info, Change::EnforcedAgain, text);
                }
            }
            Ok(Reconciled::Postponed) => {
                let error = "another program undoes repairs again and again: the next repair waits";
                self.fail(&link, error.to_owned());
            }
            Ok(Reconciled::Yielded) => {
                self.node.errors.insert(link.index, "another imds-agent has its filter there".to_owned());
            }
            // RTM_DELLINK follows.
            Err(error) if error.is_interface_deleted() => {
                log::debug!("{} (ifindex {}): deleted during reconciliation", link.name, link.index);
            }
            Err(error) => self.fail(&link, format!("{:#}", anyhow::Error::from(error))),
        }
        // The link may have left the attach queue.
        self.set_ready();
    }

    fn fail(&mut self, link: &Link, error: String) {
        if self.node.errors.get(&link.index) != Some(&error) {
            let text = format!("{} (ifindex {}): not enforced: {error}", link.name, link.index);
            self.changes.log_change(Level::Error, Change::NotEnforced, text);
            self.node.errors.insert(link.index, error);
        }
    }

    async fn reconcile(&mut self, link: &Link, is_new: bool) -> Result<Reconciled, DatapathError> {
        let mut observed = Vec::new();
        for hook in TcHook::ALL {
            observed.push((hook, self.datapath.observe(link, hook, !self.progress.initial_sync_done).await?));
        }
        // A record that cannot be written, for example because a map is full, must not prevent the attachment.
        let mut recorded = Ok(());
        // The exemptions under this index belong to this link if an earlier agent ended before the link had its turn.
        let was_queued = self.exemptions.retain_previous_exemptions && self.datapath.was_pending(link);
        if is_new && !was_queued && observed.iter().all(|(_, attachments)| attachments.is_empty()) {
            // Otherwise records and counters under this index belong to a deleted interface.
            recorded = self.datapath.claim_ifindex(link);
        }
        let mut assignment = self.assign(link);
        let has_node_egress =
            observed.iter().any(|(hook, attachments)| *hook == TcHook::NodeEgress && !attachments.is_empty());
        if link.leads_elsewhere() && has_node_egress {
            // Detaching the hook from a link that turns out to be a pod's would take RTNL without need.
            assignment.hooks =
                interface_role::assign(link, &self.node.uplinks, &self.interfaces, false).hooks;
        }
        // Desired programs are attached before others are detached.
        observed.sort_by_key(|(hook, _)| !assignment.hooks.contains(*hook));
        let mut state = LinkState { assignment, attach_modes: [AttachMode::None; 2], is_pending: false };
        let (mut failed, mut reconciled) = (None, Reconciled::AsDesired);
        for (hook, attachments) in observed {
            let point = AttachPoint { ifindex: link.index, hook };
            let desired = self.datapath.desired_mode(link, assignment.hooks, hook);
            let is_lost =
                attachments.is_empty() && desired != AttachMode::None && self.attaching.turn != Some(point);
            if hook == TcHook::FromPod && is_lost && !was_queued && !self.attaching.queue.contains(point) {
                // No program of the agent is there: the exemptions of this index may belong to a deleted interface.
                recorded = recorded.and(self.datapath.remove_exemptions(link.index));
                self.exemptions.dirty = true;
            }
            if self.must_wait(link, point, desired, &attachments).await? {
                state.is_pending = true;
                state.set_mode(hook, observed_mode(&attachments));
                continue;
            }
            self.attaching.queue.remove(point);
            let result = self.reconcile_hook(link, (hook, desired), &attachments, is_new).await;
            if matches!(result, Ok(Reconciled::AsDesired)) {
                self.attaching.failed.remove(&point);
                if desired == AttachMode::None {
                    self.attaching.attached.remove(&point);
                } else {
                    self.attaching.attached.insert(point);
                }
            } else {
                self.attaching.failed.insert(point);
            }
            match result {
                Ok(Reconciled::AsDesired) => state.set_mode(hook, desired),
                Ok(postponed @ (Reconciled::Postponed | Reconciled::Yielded)) => {
                    state.set_mode(hook, observed_mode(&attachments));
                    reconciled = postponed;
                }
                // The hook only prepares this link for a route to an endpoint, so an obstacle is not an error.
                Err(error @ DatapathError::Obstacle(_)) if self.node.uplinks.is_optional(link, hook) => {
                    log::debug!("{} (ifindex {}): {:#}", link.name, link.index, anyhow::Error::from(error));
                    state.assignment.hooks = TcHookSet::FROM_POD;
                }
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        let mut recorded = recorded.and(self.datapath.record(link, state));
        // The link of a pod has neither ports nor a peer in this namespace.
        let others = self.node.links.values().filter(|_| !link.leads_elsewhere());
        for dependent in others.filter(|other| other.is_port_or_peer_of(link.index)) {
            recorded = recorded.and(self.datapath.update_dependent(dependent));
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
        let point = AttachPoint { ifindex: link.index, hook };
        let mut actions = plan(desired, attachments);
        if actions.is_empty() {
            self.attaching.backoff.clear(point);
        }
        let yields = self.yield_to_earlier(&mut actions);
        let is_missing = actions.iter().any(|action| matches!(action, Action::Attach(_)));
        if self.is_repair(point, &actions, is_new)
            && !self.attaching.backoff.allow(point, is_missing, Instant::now())
        {
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
        let has_failed =
            self.attaching.failed.contains(&point) && self.attaching.backoff.next_retry(point).is_none();
        let is_expected = is_new
            || has_failed
            || self.progress.in_reload
            || !self.progress.initial_sync_done
            || self.attaching.turn == Some(point);
        let is_first = !self.attaching.attached.contains(&point);
        let is_repair =
            |action: &Action| action.is_repair() && !(is_first && matches!(action, Action::Attach(_)));
        !is_expected && actions.iter().any(is_repair)
    }

    /// Returns the log level of a change: `info` during a reload and the initial sync, otherwise `warn`, because
    /// another program caused the change.
    pub(super) fn change_log_level(&self) -> Level {
        if self.progress.in_reload || !self.progress.initial_sync_done { Level::Info } else { Level::Warn }
    }

    async fn warn_if_blocked(&mut self, link: &Link, hook: TcHook) -> Result<(), DatapathError> {
        let attachments = self.datapath.observe(link, hook, false).await?;
        if attachments.iter().any(|attachment| attachment.order == Order::Blocked) {
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
        self.exemptions.pods.on_link_deleted(index);
        self.attaching.queue.remove_link(index);
        self.attaching.backoff.remove_link(index);
        self.attaching.failed.retain(|point| point.ifindex != index);
        self.attaching.attached.retain(|point| point.ifindex != index);
        if let Some(link) = self.node.links.remove(&index) {
            let text = format!("{} (ifindex {index}) was deleted", link.name);
            self.changes.log_change(Level::Info, Change::Deleted, text);
        }
        self.node.errors.remove(&index);
        if let Err(error) = self.datapath.remove_interface(index) {
            let error = anyhow::Error::from(error);
            log::error!("failed to clean up state of deleted interface {index}: {error:#}");
        }
        self.set_ready();
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
