//! Keeps the listeners of scoped exemptions current: opens and closes them, and redirects connections to them.

use std::{future::pending, io, mem, path::PathBuf};

use imds_broker::protocol::{FromBroker, Outcome, Request, ToBroker};
use imds_ebpf_common::{Hook, RedirectRecord, redirect::HTTP_PORT};
use tokio::time::{Instant, sleep_until};

use super::{
    Reconciler,
    broker::{Broker, BrokerEvent},
    scoped::{CHECK_INTERVAL, OpenListener, ScopedState, failure},
    scoped_rules::DesiredListener,
};
use crate::{
    datapath::DatapathError,
    escape::escape,
    kube::Pod,
    node::namespace_paths::cgroup_with,
    telemetry::{agent_stats::BrokerStats, http_request::RequestEvent},
};

impl Reconciler {
    /// Lets the agent start a broker for scoped exemptions. `program` is its path; the default is beside the agent.
    #[must_use]
    pub fn with_broker(mut self, program: Option<PathBuf>) -> Self {
        self.scoped.broker = Some(Broker::new(program));
        self
    }

    /// Returns the numbers of requests and restarts since the agent started.
    pub fn broker_stats(&self) -> BrokerStats {
        self.scoped.stats()
    }

    /// Waits until [`Reconciler::on_broker_changed`] has something to do.
    pub async fn broker_changed(&self) {
        let Some(broker) = &self.scoped.broker else { return pending().await };
        if self.scoped.open.is_empty() && self.scoped.failed.is_empty() && !self.explains() {
            return broker.changed().await;
        }
        tokio::select! {
            () = broker.changed() => {}
            () = sleep_until(self.scoped.checked + CHECK_INTERVAL) => {}
        }
    }

    /// Handles the events of the broker, and closes the listeners of pods that have ended.
    pub async fn on_broker_changed(&mut self) -> Result<(), DatapathError> {
        let events = self.scoped.broker.as_mut().map(Broker::poll).unwrap_or_default();
        let mut is_changed = false;
        let mut result = Ok(());
        for event in events {
            let handled = match event {
                BrokerEvent::Ready | BrokerEvent::Ended => {
                    is_changed = true;
                    self.on_broker_state()
                }
                BrokerEvent::Message(message) => self.on_broker_message(message),
            };
            result = result.and(handled);
        }
        if self.scoped.checked.elapsed() >= CHECK_INTERVAL {
            self.scoped.checked = Instant::now();
            for id in self.scoped.ended() {
                result = result.and(self.close_listener(id));
            }
            self.find_explained_pods().await;
            result = result.and(self.reconcile_listeners());
        }
        if is_changed {
            // Before the exemptions, because resolving all rules again takes long on a node with many of them.
            result = result.and(self.reconcile_listeners());
            if self.kubepods.is_some() {
                // The broker itself needs an exemption from `hooks.host_network`.
                result = result.and(self.reconcile_exemptions().await);
            }
        }
        result
    }

    /// Adapts the state to a broker that has started or ended.
    fn on_broker_state(&mut self) -> Result<(), DatapathError> {
        let identity = self.scoped.broker.as_ref().and_then(Broker::identity);
        if identity.is_none() {
            self.scoped.open.clear();
            self.scoped.active.clear();
        }
        let cleared = if identity.is_none() { self.datapath.clear_redirects() } else { Ok(()) };
        cleared.and(self.reconcile_node_allow())
    }

    /// Returns the user of the broker if the allow list of the node needs it. Never returns root, because an entry for root would allow
    /// other processes of the node.
    pub(super) fn broker_uid(&self) -> Option<u32> {
        let is_needed = self.datapath.hooks().contains(Hook::NodeAllow) && self.scoped.needs_endpoints();
        let broker = self.scoped.broker.as_ref().filter(|_| is_needed)?;
        broker.identity().map(|(_, uid)| uid).filter(|&uid| uid != 0)
    }

    fn on_broker_message(&mut self, message: FromBroker) -> Result<(), DatapathError> {
        match message {
            FromBroker::Ready {} | FromBroker::Pong {} => Ok(()),
            FromBroker::Listening { id } => {
                let activated = self.activate(id);
                if let (Err(error), Some(open)) = (&activated, self.scoped.open.get(&id)) {
                    let failed = failure(open.redirect, &open.desired, &io::Error::other(error.to_string()));
                    self.scoped.failed.insert(open.redirect, failed);
                    return activated.and(self.close_listener(id));
                }
                activated
            }
            FromBroker::Closed { id, error } => {
                let Some(open) = self.scoped.open.get(&id) else { return Ok(()) };
                let error = error.unwrap_or_else(|| "no reason given".to_owned());
                let failed = failure(open.redirect, &open.desired, &io::Error::other(error));
                self.scoped.failed.insert(open.redirect, failed);
                let closed = self.close_listener(id);
                closed.and(self.record_rule_errors())
            }
            FromBroker::Request(request) => {
                self.scoped.count_request(&request);
                self.log_request(&request);
                self.add_request(request);
                Ok(())
            }
        }
    }

    /// Logs a request that was not answered by the endpoint. The broker limits the number of its reports.
    fn log_request(&self, request: &Request) {
        let Request { id, method, path, outcome, status, reason, suppressed, .. } = request;
        let verb = match outcome {
            Outcome::Allowed => return,
            Outcome::Refused => "refused",
            Outcome::Failed => "failed to forward",
        };
        let Some(OpenListener { redirect: (cookie, endpoint), desired, .. }) = self.scoped.open.get(id)
        else {
            return;
        };
        let sender = match self.exemptions.pods.pod_in(*cookie) {
            Some(Pod { namespace, name, .. }) => format!("pod {namespace}/{name}"),
            None => format!("the network namespace with cookie {cookie}"),
        };
        let suppressed =
            if *suppressed > 0 { format!(", {suppressed} more suppressed") } else { String::new() };
        // The datapath has reported the denial.
        let level = if desired.explains() { log::Level::Debug } else { log::Level::Info };
        log::log!(
            level,
            "{verb} {} {} to {endpoint} from {sender}, status {status}: {}{suppressed}",
            escape(method),
            escape(path),
            escape(reason)
        );
    }

    /// Keeps a request for telemetry, with the identity of the pod to which its listener belongs.
    fn add_request(&mut self, request: Request) {
        let Some(OpenListener { redirect: (cookie, endpoint), desired, .. }) =
            self.scoped.open.get(&request.id)
        else {
            return;
        };
        let exempt = &self.exemptions.rules.exempt;
        let rule = (desired.rule as usize).checked_sub(1).and_then(|index| exempt.get(index));
        let rules = (rule.map(|rule| rule.name.clone()), desired.rules.saturating_sub(1));
        let event = RequestEvent::from_broker(request, *cookie, (*endpoint, HTTP_PORT), rules);
        self.scoped.requests.push(event);
    }

    /// Returns the requests of pods since the last call.
    pub fn take_requests(&mut self) -> Vec<RequestEvent> {
        mem::take(&mut self.scoped.requests)
    }

    /// Redirects connections to a listener that the broker serves, and closes the one before.
    fn activate(&mut self, id: u32) -> Result<(), DatapathError> {
        let Some(OpenListener { redirect, port, desired, .. }) = self.scoped.open.get(&id) else {
            return Ok(());
        };
        let (redirect, record) = (*redirect, record(*port, desired));
        let changes = self.datapath.set_has_redirects(true);
        self.report_cgroups(changes)?;
        self.datapath.set_redirect(redirect, record)?;
        match self.scoped.active.insert(redirect, id).filter(|&before| before != id) {
            Some(before) => self.close_listener(before),
            None => Ok(()),
        }
    }

    /// Ends the redirection to a listener, then closes it.
    fn close_listener(&mut self, id: u32) -> Result<(), DatapathError> {
        let Some(open) = self.scoped.open.get(&id) else { return Ok(()) };
        let redirect = open.redirect;
        if self.scoped.active.get(&redirect) == Some(&id) {
            self.datapath.remove_redirect(redirect)?;
            self.scoped.active.remove(&redirect);
        }
        self.scoped.open.remove(&id);
        self.scoped.send(ToBroker::Close { id }, None);
        Ok(())
    }

    /// Brings the listeners to the desired state. Continues after an error, which the next call repeats.
    pub(super) fn reconcile_listeners(&mut self) -> Result<(), DatapathError> {
        let ScopedState { desired, open, failed, .. } = &mut self.scoped;
        failed.retain(|redirect, _| desired.contains_key(redirect));
        // A listener that allows more than its rules ends before its successor starts, which may fail.
        let is_obsolete = |open: &OpenListener| {
            desired.get(&open.redirect).is_none_or(|desired| !open.desired.is_within(desired))
        };
        let obsolete: Vec<_> = open.iter().filter(|(_, open)| is_obsolete(open)).map(|(&id, _)| id).collect();
        let mut result = Ok(());
        for id in obsolete {
            result = result.and(self.close_listener(id));
        }
        // The allow list of the node has the user of the broker only while a rule needs endpoints, and that has just changed.
        if self.node_processes.broker_uid != self.broker_uid() {
            result = result.and(self.reconcile_node_allow());
        }
        let is_needed = !self.scoped.desired.is_empty();
        if let Some(broker) = &mut self.scoped.broker {
            broker.set_needed(is_needed);
        }
        if self.scoped.is_ready() {
            self.scoped.open_missing();
            result = result.and(self.replace_listeners());
        }
        if self.scoped.active.is_empty() {
            let changes = self.datapath.set_has_redirects(false);
            result = result.and(self.report_cgroups(changes));
        }
        result.and(self.record_rule_errors())
    }

    /// Closes listeners that were never active and have a successor, and updates the rule numbers of active ones.
    fn replace_listeners(&mut self) -> Result<(), DatapathError> {
        let newest = self.scoped.newest();
        let ScopedState { open, active, desired, .. } = &mut self.scoped;
        let is_old = |(id, open): &(&u32, &OpenListener)| {
            newest.get(&open.redirect) != Some(*id) && active.get(&open.redirect) != Some(*id)
        };
        let old: Vec<_> = open.iter().filter(is_old).map(|(&id, _)| id).collect();
        let mut renumbered = Vec::new();
        for (id, open) in open {
            let Some(desired) = desired.get(&open.redirect).filter(|desired| open.desired.serves(desired))
            else {
                continue;
            };
            if open.desired != *desired {
                open.desired = desired.clone();
                if active.get(&open.redirect) == Some(id) {
                    renumbered.push((open.redirect, record(open.port, desired)));
                }
            }
        }
        let mut result = Ok(());
        for (redirect, record) in renumbered {
            result = result.and(self.datapath.set_redirect(redirect, record));
        }
        for id in old {
            result = result.and(self.close_listener(id));
        }
        result
    }

    /// Returns the cgroup of the broker if it is below one of Kubernetes pods, where `hooks.host_network` denies its requests.
    pub(super) fn broker_cgroup(&mut self) -> Option<u64> {
        let kubepods = self.kubepods.as_ref().filter(|_| self.scoped.needs_endpoints())?;
        let (pid, _) = self.scoped.broker.as_ref().and_then(Broker::identity)?;
        match self.scoped.cgroup {
            Some((known, cgroup)) if known == pid => cgroup,
            _ => {
                let cgroup = cgroup_with(&kubepods.found, pid);
                self.scoped.cgroup = Some((pid, cgroup));
                cgroup
            }
        }
    }
}

fn record(port: u16, &DesiredListener { rule, rules, .. }: &DesiredListener) -> RedirectRecord {
    RedirectRecord { port: port.into(), rule, rules, reserved: 0 }
}
