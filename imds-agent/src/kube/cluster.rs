//! Connection to the cluster, as the configuration demands.

use std::{collections::BTreeSet, future::pending};

use tokio::sync::watch::Receiver;

use crate::{
    config::Access,
    kube::{Namespace, NamespaceEvent, ObjectEvent, Options, Pod, PodEvent, Resource, WatchState, Watcher},
};

/// Number of namespaces per page of a list, if the server has pages. A tenant may write annotations of 256 KiB to each.
const NAMESPACE_PAGE: u32 = 200;

/// Configuration of the pod watch.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ApiConfig {
    /// Address and credentials of the API server.
    pub access: Access,
    /// Name of the node in the cluster.
    pub node: String,
}

/// Objects that the agent writes to the cluster. Each needs a role of its own.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct ClusterWrites {
    /// Events about denied pods and about the node.
    pub events: bool,
    /// Condition `MetadataProtected` of the node.
    pub node_condition: bool,
}

/// Event of the watches.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum ClusterEvent {
    /// Change of this node's pods.
    Pods(PodEvent),
    /// Change of the pod watch's connection to the API server.
    State(WatchState),
    /// Change of the cluster's namespaces.
    Namespaces(NamespaceEvent),
    /// Change of the namespace watch's connection to the API server.
    NamespaceState(WatchState),
}

/// Watches of this node's pods and of the cluster's namespaces, if the configuration demands them.
#[derive(Debug, Default)]
pub struct Cluster {
    api: Option<ApiConfig>,
    pods: Option<Watched<Pod>>,
    namespaces: Option<Watched<Namespace>>,
    /// Keys of the labels that the namespace watch reports.
    label_keys: BTreeSet<String>,
}

impl Cluster {
    /// Starts, replaces or stops the watches according to `desired`. Rules use the labels of namespaces with `label_keys`:
    /// without any, namespaces are not watched. Must be called within a tokio runtime.
    pub fn set_api(&mut self, desired: Option<&ApiConfig>, label_keys: BTreeSet<String>) {
        let is_same = self.api.as_ref() == desired;
        if !is_same {
            self.api = desired.cloned();
            self.pods = desired.map(|ApiConfig { access, node }| {
                log::info!("watching the pods of node {node}");
                Watched::new(Watcher::start(access.clone(), node.clone(), Options::default()))
            });
        }
        if is_same && self.label_keys == label_keys {
            return;
        }
        self.label_keys = label_keys;
        let desired = desired.filter(|_| !self.label_keys.is_empty());
        self.namespaces = desired.map(|ApiConfig { access, .. }| {
            log::info!("watching the namespaces of the cluster");
            let options = Options { page: NAMESPACE_PAGE, ..Options::default() };
            Watched::new(Watcher::start(access.clone(), self.label_keys.clone(), options))
        });
    }

    /// Returns the node's name in the cluster, or `None` if there is no watch.
    pub fn node(&self) -> Option<&str> {
        self.api.as_ref().map(|api| api.node.as_str())
    }

    /// Returns the state of the pod watch, or `None` if there is no watch.
    pub fn state(&self) -> Option<WatchState> {
        self.pods.as_ref().map(Watched::state)
    }

    /// Returns the state of the namespace watch, or `None` if there is no watch.
    pub fn namespace_state(&self) -> Option<WatchState> {
        self.namespaces.as_ref().map(Watched::state)
    }

    /// Returns the keys of the labels that [`ClusterEvent::Namespaces`] contains.
    pub fn label_keys(&self) -> &BTreeSet<String> {
        &self.label_keys
    }

    /// Waits for the next event. Cancel safe.
    pub async fn next(&mut self) -> ClusterEvent {
        let Self { pods, namespaces, .. } = self;
        tokio::select! {
            event = next(pods) => match event {
                Ok(event) => ClusterEvent::Pods(event),
                Err(state) => ClusterEvent::State(state),
            },
            event = next(namespaces) => match event {
                Ok(event) => ClusterEvent::Namespaces(event),
                Err(state) => ClusterEvent::NamespaceState(state),
            },
        }
    }
}

#[derive(Debug)]
struct Watched<T> {
    watcher: Watcher<T>,
    state: Receiver<WatchState>,
}

impl<T: Resource> Watched<T> {
    fn new(watcher: Watcher<T>) -> Self {
        let mut state = watcher.state();
        state.mark_changed();
        Self { watcher, state }
    }

    fn state(&self) -> WatchState {
        self.state.borrow().clone()
    }
}

/// Waits for the next event, or for a state of the connection. Cancel safe.
async fn next<T: Resource>(watched: &mut Option<Watched<T>>) -> Result<ObjectEvent<T>, WatchState> {
    let Some(Watched { watcher, state }) = watched else { return pending().await };
    tokio::select! {
        // Return an event before the state that followed from it.
        biased;
        Some(event) = watcher.next() => Ok(event),
        Ok(()) = state.changed() => Err(state.borrow_and_update().clone()),
        else => pending().await,
    }
}
