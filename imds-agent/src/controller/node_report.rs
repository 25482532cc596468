//! Reports the enforcement of the node to the cluster: Events about the node, and its condition `MetadataProtected`.

use std::{future::pending, time::Duration};

use imds_ebpf_common::Mode;
use jiff::Timestamp;
use tokio::{
    sync::watch,
    time::{Instant, sleep},
};

use crate::{
    datapath::{DatapathError, pin::dir::PinDir},
    kube::{
        Backoff, ClusterClient, Condition, EventSeries, NewEvent, Regarding, RequestError,
        cluster::ClusterWrites,
    },
    node::netlink::Netlink,
    telemetry::{agent_stats::DriftCorrections, status},
};

/// Interval of the checks.
const PERIOD: Duration = Duration::from_secs(5);
/// Smallest interval in multiples of the duration of a check: with 1,000 pods, a check reads for a third of a second.
const PERIOD_PER_CHECK: u32 = 50;
/// Interval of the checks until the state is settled, so that a new node becomes usable soon.
const UNSETTLED_PERIOD: Duration = Duration::from_secs(1);
/// Number of checks in a row that must find the node unprotected. A single one can coincide with the creation of a pod.
const UNPROTECTED_CHECKS: u32 = 2;
/// Interval of the heartbeats of the condition. The kubelet updates its own conditions every 5 minutes.
const HEARTBEAT: Duration = Duration::from_mins(10);
/// Minimum interval of updates of the condition that change only its message.
const MESSAGE_PERIOD: Duration = Duration::from_mins(1);
/// Minimum interval of Events with the same reason.
const EVENT_PERIOD: Duration = Duration::from_mins(1);
/// Number of attempts to withdraw the condition. The role may be removed together with the key.
const WITHDRAW_ATTEMPTS: u32 = 5;
/// Type of the condition.
const CONDITION: &str = "MetadataProtected";
/// Largest length of the text that explains a state, in bytes.
const MAX_TEXT: usize = 800;

/// Source of the enforcement state.
#[derive(Clone)]
pub(super) struct NodeView {
    pub pins: PinDir,
    pub netlink: Netlink,
}

/// Enforcement on the node.
#[derive(Clone, Debug, Eq, PartialEq)]
enum NodeState {
    /// These hooks, all that are enabled, deny requests to protected endpoints.
    Protected(Vec<&'static str>),
    /// Mode audit or off: requests pass.
    NotEnforcing(Mode),
    /// Something lacks enforcement, as the text explains.
    Unprotected(String),
}

/// Task that reports the enforcement of the node.
pub(super) struct NodeReporter {
    node: NodeView,
    client: ClusterClient,
    writes: ClusterWrites,
    /// Corrections of the agent. Each update, also one without a change, requests a check.
    corrections: watch::Receiver<DriftCorrections>,
    /// Corrections for which an Event was written.
    reported: DriftCorrections,
    /// State in the last check that settled.
    settled: Option<NodeState>,
    unprotected_checks: u32,
    /// Last condition that the API server stored, and the time.
    condition: Option<(Condition, Instant)>,
    /// True while an Event says that the node is unprotected.
    is_warned: bool,
    next_state_event: Instant,
    next_repair_event: Instant,
    next_attempt: Instant,
    /// Event whose creation failed. The API server may have stored it nevertheless, under the name that a retry must use.
    unconfirmed: Option<NewEvent>,
    backoff: Backoff,
    last_error: Option<String>,
}

/// Sets the condition of a node on which nothing is enforced any more.
pub async fn report_unloaded(client: &mut ClusterClient) -> Result<(), RequestError> {
    client
        .set_condition(
            &NodeState::Unprotected("imds-agent unload has removed everything".to_owned()).condition(),
        )
        .await
}

/// Removes the claim of the condition: its key is switched off.
pub(super) async fn withdraw_condition(mut client: ClusterClient) {
    let message = "the agent no longer reports this condition (kubernetes.node_condition)".to_owned();
    let condition = Condition { kind: CONDITION, is_true: false, reason: "NotReported", message };
    let mut backoff = Backoff::default();
    for _ in 0..WITHDRAW_ATTEMPTS {
        let Err(error) = client.set_condition(&condition).await else { return };
        log::warn!("failed to withdraw the condition {CONDITION} of node {}: {error}", client.node());
        sleep(backoff.next_delay(error.retry_after)).await;
    }
}

impl NodeView {
    async fn state(&self) -> Result<NodeState, DatapathError> {
        let report = status::gather_enforcement(&self.pins, &self.netlink).await?;
        let gaps = report.gaps();
        let modes = [Mode::Audit, Mode::Off].into_iter();
        Ok(match modes.into_iter().find(|mode| report.mode == Some(mode.name())) {
            _ if !gaps.is_empty() => NodeState::Unprotected(gaps.join("; ")),
            Some(mode) => NodeState::NotEnforcing(mode),
            None => NodeState::Protected(report.hooks),
        })
    }
}

impl NodeState {
    fn condition(&self) -> Condition {
        let (reason, message) = match self {
            Self::Protected(hooks) => {
                ("Enforced", format!("all enabled hooks are enforced: {}", hooks.join(", ")))
            }
            Self::NotEnforcing(mode) => {
                ("NotEnforcing", format!("mode {}: pods can reach the metadata endpoints", mode.name()))
            }
            Self::Unprotected(text) => ("NotEnforced", clip(text)),
        };
        Condition { kind: CONDITION, is_true: matches!(self, Self::Protected(_)), reason, message }
    }
}

impl NodeReporter {
    pub(super) fn new(
        node: NodeView,
        client: ClusterClient,
        writes: ClusterWrites,
        corrections: watch::Receiver<DriftCorrections>,
    ) -> Self {
        let (now, reported) = (Instant::now(), *corrections.borrow());
        Self {
            node,
            client,
            writes,
            corrections,
            reported,
            settled: None,
            unprotected_checks: 0,
            condition: None,
            is_warned: false,
            next_state_event: now,
            next_repair_event: now,
            next_attempt: now,
            unconfirmed: None,
            backoff: Backoff::default(),
            last_error: None,
        }
    }

    /// Checks and reports until it is dropped.
    pub(super) async fn run(mut self) {
        loop {
            let started = Instant::now();
            self.check().await;
            let now = Instant::now();
            if self.next_attempt <= now && self.settled.is_some() {
                let result = self.report(now).await;
                self.on_result(result);
            }
            let is_settled = self.settled.is_some() && self.unprotected_checks != 1;
            let settled_period = PERIOD.max((now - started) * PERIOD_PER_CHECK);
            let period = if is_settled { settled_period } else { UNSETTLED_PERIOD };
            tokio::select! {
                () = sleep(period) => {}
                () = changed(&mut self.corrections) => {}
            }
        }
    }

    async fn check(&mut self) {
        let state = match self.node.state().await {
            Ok(state) => state,
            Err(error) => NodeState::Unprotected(format!("{:#}", anyhow::Error::from(error))),
        };
        if !matches!(state, NodeState::Unprotected(_)) {
            self.unprotected_checks = 0;
            self.settled = Some(state);
            return;
        }
        self.unprotected_checks = self.unprotected_checks.saturating_add(1);
        if self.unprotected_checks >= UNPROTECTED_CHECKS {
            self.settled = Some(state);
        }
    }

    /// Writes what has changed since the last report. Condition and Events need different roles: one is written without the other.
    async fn report(&mut self, now: Instant) -> Result<(), RequestError> {
        let Some(state) = self.settled.clone() else { return Ok(()) };
        let condition = self.report_condition(&state, now).await;
        let events = self.report_events(&state, now).await;
        condition.and(events)
    }

    async fn report_condition(&mut self, state: &NodeState, now: Instant) -> Result<(), RequestError> {
        let condition = state.condition();
        let is_current = self.condition.as_ref().is_some_and(|(known, written)| {
            let is_same_state = (known.is_true, known.reason) == (condition.is_true, condition.reason);
            // The list of interfaces in the message can change with each pod.
            let validity = if *known == condition { HEARTBEAT } else { MESSAGE_PERIOD };
            is_same_state && now < *written + validity
        });
        if self.writes.node_condition && !is_current {
            self.client.set_condition(&condition).await?;
            self.condition = Some((condition, now));
        }
        Ok(())
    }

    async fn report_events(&mut self, state: &NodeState, now: Instant) -> Result<(), RequestError> {
        if self.writes.events {
            self.report_state(state, now).await?;
            self.report_corrections(now).await?;
        }
        Ok(())
    }

    async fn report_state(&mut self, state: &NodeState, now: Instant) -> Result<(), RequestError> {
        if now < self.next_state_event {
            return Ok(());
        }
        let (reason, action, note) = match state {
            NodeState::Unprotected(text) if !self.is_warned => (
                "MetadataNotEnforced",
                "Enforce",
                format!("Pods may reach the metadata endpoints: {}", clip(text)),
            ),
            NodeState::Protected(_) if self.is_warned => {
                ("MetadataProtected", "Enforce", "All enabled hooks are enforced again".to_owned())
            }
            _ => return Ok(()),
        };
        let is_warning = !self.is_warned;
        self.create_event(is_warning, reason, action, note).await?;
        self.is_warned = is_warning;
        self.next_state_event = now + EVENT_PERIOD;
        Ok(())
    }

    async fn report_corrections(&mut self, now: Instant) -> Result<(), RequestError> {
        let corrections = *self.corrections.borrow_and_update();
        if now < self.next_repair_event {
            return Ok(());
        }
        let Some(text) = corrections.describe_since(&self.reported) else { return Ok(()) };
        let note = format!("Repaired attachments after changes by other programs: {text}");
        self.create_event(true, "MetadataProtectionRepaired", "Repair", note).await?;
        self.reported = corrections;
        self.next_repair_event = now + EVENT_PERIOD;
        Ok(())
    }

    async fn create_event(
        &mut self,
        is_warning: bool,
        reason: &'static str,
        action: &'static str,
        note: String,
    ) -> Result<(), RequestError> {
        let time = Timestamp::now();
        let regarding = Regarding::Node(self.client.node().to_owned());
        let series = EventSeries { count: 1, last: time };
        let event = NewEvent { regarding, is_warning, reason, action, note, time, series };
        let is_retry = |earlier: &NewEvent| (earlier.reason, &earlier.note) == (reason, &event.note);
        let event = self.unconfirmed.take().filter(is_retry).unwrap_or(event);
        let result = self.client.create_event(&event).await.map(drop);
        self.unconfirmed = result.is_err().then_some(event);
        result
    }

    fn on_result(&mut self, result: Result<(), RequestError>) {
        let Err(error) = result else {
            self.backoff.reset();
            if self.last_error.take().is_some() {
                log::info!("reporting the state of the node to the cluster succeeds again");
            }
            return;
        };
        self.next_attempt = Instant::now() + self.backoff.next_delay(error.retry_after);
        let text = error.to_string();
        if self.last_error.as_ref() != Some(&text) {
            log::warn!("failed to report the state of node {} to the cluster: {text}", self.client.node());
            self.last_error = Some(text);
        }
    }
}

async fn changed(corrections: &mut watch::Receiver<DriftCorrections>) {
    if corrections.changed().await.is_err() {
        pending::<()>().await;
    }
}

fn clip(text: &str) -> String {
    let end = text.floor_char_boundary(MAX_TEXT);
    let rest = if end < text.len() { " …" } else { "" };
    format!("{}{rest}", text.get(..end).unwrap_or_default())
}
