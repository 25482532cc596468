//! Reconciles the node: follows its interfaces, and brings the attachments of each to the desired state.

mod attach_queue;
mod attach_turns;
mod broker;
mod cgroups;
mod change_log;
pub mod cluster_report;
pub mod event_loop;
pub mod exemption_rules;
mod exemptions;
mod explained;
mod links;
mod node_allow_sync;
pub mod node_report;
mod observed_node;
mod other_agents;
pub mod plan;
pub mod pod_tracker;
pub mod repair_backoff;
mod requested_resync;
pub mod resolved_config;
mod resync;
mod scoped;
mod scoped_rules;
mod scoped_sync;
pub mod start_config;
pub mod startup_taint;

use std::time::Duration;

use imds_ebpf_common::{AttachMode, Hook, Role, TcHook};

use self::{
    attach_turns::AttachState,
    change_log::{ChangeLog, Pass},
    exemptions::ExemptionState,
    observed_node::ObservedNode,
    other_agents::OtherAgents,
    resync::SyncProgress,
    scoped::ScopedState,
};

use crate::{
    config::Interfaces,
    controller::{resolved_config::ResolvedConfig, start_config::StartConfig},
    datapath::{Datapath, DatapathError},
    node::{
        interface_role::Uplinks, kubepods::Kubepods, link_event::Event, netlink::Netlink,
        node_processes::NodeProcesses, sender_resolver::SenderResolver,
    },
    telemetry::agent_stats::{DriftCorrections, MapUpdates},
};

/// Compares the desired with the observed state of all interfaces, and reconciles them.
pub struct Reconciler {
    datapath: Datapath,
    netlink: Netlink,
    interfaces: Interfaces,
    /// Cgroups of Kubernetes pods, if hostNetwork pods are restricted.
    kubepods: Option<Kubepods>,
    /// Reason why no hostNetwork pod is restricted, if that is so.
    no_kubepods: Option<String>,
    /// Processes of the node that may reach protected endpoints.
    node_processes: NodeProcesses,
    node: ObservedNode,
    exemptions: ExemptionState,
    scoped: ScopedState,
    attaching: AttachState,
    progress: SyncProgress,
    other_agents: OtherAgents,
    changes: ChangeLog,
    corrections: DriftCorrections,
    map_updates: MapUpdates,
}

impl Reconciler {
    /// Returns a reconciler that knows no interface yet.
    pub fn new(
        datapath: Datapath,
        netlink: Netlink,
        config: &ResolvedConfig,
        resolver: SenderResolver,
    ) -> Self {
        let ResolvedConfig { interfaces, node_allow, kubepods, .. } = config;
        Self {
            datapath,
            netlink,
            interfaces: interfaces.clone(),
            kubepods: kubepods.clone().map(Kubepods::new),
            no_kubepods: None,
            node_processes: NodeProcesses::new(node_allow.clone()),
            node: ObservedNode::default(),
            exemptions: ExemptionState::new(config, resolver),
            scoped: ScopedState::new(),
            attaching: AttachState::new(),
            progress: SyncProgress::default(),
            other_agents: OtherAgents::default(),
            changes: ChangeLog::new(),
            corrections: DriftCorrections::default(),
            map_updates: MapUpdates::default(),
        }
    }

    /// Sets the time that a new link of a pod waits for its CNI plugins before it gets a clsact qdisc.
    #[must_use]
    pub fn with_clsact_delay(mut self, delay: Duration) -> Self {
        self.attaching.clsact_delay = delay;
        self
    }

    /// Returns the numbers of drift corrections since the agent started.
    pub fn corrections(&self) -> DriftCorrections {
        DriftCorrections { postponed: self.attaching.backoff.suppressed, ..self.corrections }
    }

    /// Records the configuration, and does the first full resync.
    pub async fn start(&mut self, start: &StartConfig) -> Result<(), DatapathError> {
        let StartConfig { config, resolved, path, rejected } = start;
        self.exemptions.retain_previous_exemptions = self.datapath.was_effective(config.to_toml())?;
        self.datapath.record_config(path.as_deref(), config.to_toml())?;
        // Before the agent is ready, so that `status` never shows the fallback without its reason.
        if let Some(error) = rejected {
            self.datapath.record_rejected_config(error)?;
        }
        // The broker of an earlier agent has ended with it: other processes of a pod may now bind the ports.
        log_if_preexisting(true, self.datapath.clear_redirects())?;
        self.changes.begin(Pass::InitialSync);
        self.resync().await?;
        log::info!("{}", self.summary(resolved));
        Ok(())
    }

    /// Applies another configuration. A protected endpoint that both the old and the new one contain stays protected
    /// throughout.
    ///
    /// After an error the configuration may be applied in part: call this again with the previous ones.
    pub async fn reconfigure(&mut self, resolved: &ResolvedConfig) -> Result<(), DatapathError> {
        self.progress.in_reload = true;
        self.changes.begin(Pass::Reload);
        let result = self.apply_config(resolved).await;
        self.changes.end(Pass::Reload);
        self.progress.in_reload = false;
        result
    }

    async fn apply_config(&mut self, resolved: &ResolvedConfig) -> Result<(), DatapathError> {
        let ResolvedConfig {
            datapath_config, endpoint_set, interfaces, exempt, node_allow, kubepods, ..
        } = resolved;
        // The datapath refers to rules by number, and other rules may change the numbers.
        self.exemptions.retain_previous_exemptions &= self.exemptions.rules.exempt == *exempt;
        // New programs are attached before the maps refer to their hooks, and old ones are detached after that.
        let before = self.datapath.hooks();
        self.datapath.prepare(datapath_config)?;
        // Programs that are attached below read this map.
        self.change_node_allow(node_allow)?;
        // A hook that already failed before the reload must not make the new configuration fail.
        log_if_preexisting(before.contains(Hook::Socket), self.reconcile_sockets())?;
        if let (None, Some(root)) = (&self.kubepods, kubepods) {
            self.kubepods = Some(Kubepods::new(root.clone()));
        }
        log_if_preexisting(before.contains(Hook::HostNetwork), self.rescan_kubepods())?;
        self.interfaces = interfaces.clone();
        self.netlink = self.netlink.clone().with_endpoints(endpoint_set.addresses());
        self.node.routes = self.netlink.endpoint_routes().await?;
        self.node.uplinks = Uplinks::new(&self.node.routes, self.node.links.values());
        self.reconcile_all_links().await;
        self.resolve_sandboxes(usize::MAX).await;
        self.exemptions.endpoints = endpoint_set.into();
        self.exemptions.mode = datapath_config.mode;
        self.exemptions.on_deny = datapath_config.on_deny;
        self.change_rules(exempt.clone()).await?;
        self.datapath.enforce(datapath_config, endpoint_set)?;
        if !self.datapath.matches(datapath_config) {
            self.datapath.release(datapath_config)?;
            self.reconcile_sockets()?;
            if kubepods.is_none() {
                self.kubepods = None;
            }
            self.reconcile_host_network(true)?;
            self.reconcile_all_links().await;
        }
        // The programs that read this map are detached above if the hook is off.
        self.reconcile_node_allow()?;
        self.reconcile_exemptions().await
    }

    /// Returns one line that sums up mode, attachments and endpoints.
    pub fn summary(&self, ResolvedConfig { datapath_config, endpoint_set, .. }: &ResolvedConfig) -> String {
        let [pods, nodes] = self.count_interfaces();
        let pins = self.datapath.pins().root().display();
        let pins = if self.datapath.pin_failure().is_none() {
            format!("pins in {pins}")
        } else {
            "no pins".to_owned()
        };
        format!(
            "mode {}: {} pod and {} node interfaces, attach mode {}, socket hook {}, provider {}, {} endpoint{}, {pins}",
            datapath_config.mode.name(),
            pods,
            nodes,
            datapath_config.backend.name(),
            if datapath_config.cgroup_of(Hook::Socket).is_some() { "on" } else { "off" },
            endpoint_set.provider,
            endpoint_set.endpoints.len(),
            if endpoint_set.endpoints.len() == 1 { "" } else { "s" },
        )
    }

    /// Returns a line for `systemctl status`: mode, number of interfaces, and the first of the current errors.
    pub fn state(&self, ResolvedConfig { datapath_config, .. }: &ResolvedConfig) -> String {
        let [pods, nodes] = self.count_interfaces();
        let sockets = if datapath_config.cgroup_of(Hook::Socket).is_some() { "on" } else { "off" };
        let mode = datapath_config.mode.name();
        let state = format!("mode {mode}: {pods} pod and {nodes} node interfaces, socket hook {sockets}");
        let others = self.other_agents.running.iter().map(|agent| ("node".to_owned(), agent.to_string()));
        let mut errors = others.chain(self.errors());
        match errors.next() {
            Some((name, error)) => {
                format!("{state}; {} problems, first: {name}: {error}", 1 + errors.count())
            }
            None => state,
        }
    }

    /// Returns the numbers of pod and node interfaces that should have a program.
    fn count_interfaces(&self) -> [usize; 2] {
        let [mut pods, mut nodes] = [0; 2];
        for link in self.node.links.values() {
            let assignment = self.assign(link);
            let is_desired =
                |hook| self.datapath.desired_mode(link, assignment.hooks, hook) != AttachMode::None;
            if TcHook::ALL.into_iter().any(is_desired) {
                *if assignment.role == Role::Pod { &mut pods } else { &mut nodes } += 1;
            }
        }
        [pods, nodes]
    }

    /// Returns what is not enforced and why: by interface, cgroup and rule.
    pub fn errors(&self) -> impl Iterator<Item = (String, String)> {
        let of_interfaces = self.node.errors.iter().map(|(index, error)| {
            (
                self.node.links.get(index).map_or("deleted interface", |link| link.name.as_str()),
                error.as_str(),
            )
        });
        let of_hosts = self.no_kubepods.iter().map(|error| ("hostNetwork pods", error.as_str()));
        let of_cgroups = self.datapath.cgroup_failures().map(|error| ("cgroup", error));
        let of_programs = self.datapath.rejections().map(|error| ("node", error));
        let of_pins = self.datapath.pin_failure().map(|error| ("node", error));
        of_pins
            .into_iter()
            .chain(of_programs)
            .chain(of_interfaces)
            .chain(of_cgroups)
            .chain(of_hosts)
            .map(|(name, error)| (name.to_owned(), error.to_owned()))
            .chain(self.rule_errors())
    }

    /// Handles a netlink event. Exemptions are recomputed by [`Reconciler::flush_pending_sync`] later, but those of deleted
    /// interfaces and of reused interface indexes are removed immediately.
    pub async fn on_netlink_event(&mut self, event: Event) -> Result<(), DatapathError> {
        if let Event::Link(_) | Event::LinkGone(_) = &event {
            self.attaching.queue.on_link_event();
        }
        match event {
            Event::Link(link) => {
                let is_changed = self.node.links.get(&link.index) != Some(&link);
                self.exemptions.dirty |= is_changed;
                self.reconcile_link(link).await;
                if is_changed {
                    self.update_uplinks().await;
                }
            }
            Event::LinkGone(index) => {
                self.exemptions.dirty |= self.node.links.contains_key(&index);
                self.on_link_deleted(index);
            }
            Event::Address => self.exemptions.dirty |= self.exemptions.uses_node_addresses,
            Event::Filter(index) => {
                if let Some(link) = self.node.links.get(&index).cloned() {
                    self.reconcile_link(link).await;
                }
            }
            Event::Route(destination) if !self.netlink.may_lead_to_endpoint(destination) => {}
            Event::Route(_) | Event::Rule => self.reclassify().await?,
            Event::Overrun => {
                self.corrections.overruns += 1;
                if let Some(delay) = self.progress.requested.request() {
                    let delay = delay.as_millis();
                    log::warn!("netlink receive buffer overrun (ENOBUFS): full resync in {delay} ms");
                }
            }
        }
        Ok(())
    }

    /// Recomputes exemptions if links changed since the last call. Runs once per batch of events, because the cost
    /// grows with the number of pods.
    pub async fn flush_pending_sync(&mut self) -> Result<(), DatapathError> {
        let followed = self.reconcile_sendmsg();
        if std::mem::take(&mut self.exemptions.dirty) {
            self.reconcile_exemptions().await?;
        }
        followed
    }

    async fn reconcile_all_links(&mut self) {
        for link in self.node.links.values().cloned().collect::<Vec<_>>() {
            self.reconcile_link(link).await;
        }
    }
}

/// Returns `result`, but only logs its error if `is_old`: the error existed before, or must not stop the caller.
fn log_if_preexisting(is_old: bool, result: Result<(), DatapathError>) -> Result<(), DatapathError> {
    match result {
        Err(error) if is_old => {
            log::error!("{:#}", anyhow::Error::from(error));
            Ok(())
        }
        other => other,
    }
}
