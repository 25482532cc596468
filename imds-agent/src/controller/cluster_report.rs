//! Reports to the cluster: Events about denied pods and about the node, and a condition of the node.

use std::sync::Arc;

use tokio::{sync::watch, task::JoinSet};

use super::{
    node_report::{NodeReporter, NodeView, withdraw_condition},
    resolved_config::ResolvedConfig,
};
use crate::{
    datapath::pin::dir::PinDir,
    kube::{
        ClusterClient,
        cluster::{ApiConfig, ClusterWrites},
    },
    node::netlink::Netlink,
    telemetry::{
        agent_stats::DriftCorrections,
        pod_events::{DeniedPods, EndpointNames, EventWrites, write_events},
    },
};

/// Tasks that write to the cluster, as the configuration demands.
pub struct ClusterReport {
    node: NodeView,
    denied_pods: Arc<DeniedPods>,
    corrections: watch::Sender<DriftCorrections>,
    settings: Option<Settings>,
    tasks: JoinSet<()>,
}

#[derive(Clone, Debug, Eq, PartialEq)]
struct Settings {
    api: ApiConfig,
    writes: ClusterWrites,
    endpoints: EndpointNames,
}

impl ClusterReport {
    /// Returns a report that writes nothing yet. It takes the state of the node from `pins` and `netlink`.
    pub fn new(pins: PinDir, netlink: Netlink, denied_pods: Arc<DeniedPods>) -> Self {
        let corrections = watch::Sender::new(DriftCorrections::default());
        Self {
            node: NodeView { pins, netlink },
            denied_pods,
            corrections,
            settings: None,
            tasks: JoinSet::new(),
        }
    }

    /// Starts, replaces or stops the tasks according to the configuration. Must be called within a tokio runtime.
    pub fn set(&mut self, resolved: &ResolvedConfig) {
        let settings = Settings::of(resolved);
        if self.settings == settings {
            return;
        }
        self.tasks = JoinSet::new();
        if let Some(before) = self.settings.as_ref().filter(|before| before.writes.node_condition)
            && !settings.as_ref().is_some_and(|settings| settings.writes.node_condition)
        {
            self.tasks.spawn(withdraw_condition(ClusterClient::new(before.api.clone())));
        }
        self.denied_pods.set_enabled(settings.as_ref().is_some_and(|settings| settings.writes.events));
        if let Some(Settings { api, writes, endpoints }) = &settings {
            let writer = || ClusterClient::new(api.clone());
            if writes.events {
                let denied_pods = Arc::clone(&self.denied_pods);
                self.tasks.spawn(write_events(denied_pods, writer(), endpoints.clone()));
            }
            let corrections = self.corrections.subscribe();
            let reporter = NodeReporter::new(self.node.clone(), writer(), *writes, corrections);
            self.tasks.spawn(reporter.run());
        }
        self.settings = settings;
    }

    /// Records the drift corrections of the agent.
    pub fn on_corrections(&self, corrections: DriftCorrections) {
        self.corrections.send_if_modified(|known| std::mem::replace(known, corrections) != corrections);
    }

    /// Checks the state of the node now instead of at the next interval.
    pub fn check_now(&self) {
        self.corrections.send_modify(|_| {});
    }

    /// Returns the counters of the written Events, or `None` if the agent writes none.
    pub fn event_writes(&self) -> Option<EventWrites> {
        self.denied_pods.is_enabled().then(|| self.denied_pods.writes())
    }
}

impl Settings {
    fn of(resolved: &ResolvedConfig) -> Option<Self> {
        let (api, writes) = (resolved.cluster.clone()?, resolved.cluster_writes);
        let endpoints = &resolved.endpoint_set.endpoints;
        let names = endpoints.iter().map(|endpoint| (endpoint.address, endpoint.name.clone()));
        (writes != ClusterWrites::default()).then(|| Self { api, writes, endpoints: names.collect() })
    }
}
