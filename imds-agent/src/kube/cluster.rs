//! Connection to the cluster, as the configuration demands.

use std::future::pending;

use tokio::sync::watch::Receiver;

use crate::{
    config::Access,
    kube::{Options, PodEvent, PodWatcher, WatchState},
};

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

/// Event of the pod watch.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum ClusterEvent {
    /// Change of this node's pods.
    Pods(PodEvent),
    /// Change of the connection to the API server.
    State(WatchState),
}

/// Watch of this node's pods, if the configuration demands one.
#[derive(Debug, Default)]
pub struct Cluster {
    watched: Option<(ApiConfig, PodWatcher, Receiver<WatchState>)>,
}

impl Cluster {
    /// Starts, replaces or stops the watch according to `desired`. Must be called within a tokio runtime.
    pub fn set_api(&mut self, desired: Option<&ApiConfig>) {
        if self.watched.as_ref().map(|(desired, ..)| desired) == desired {
            return;
        }
        self.watched = desired.map(|desired| {
            let watch = PodWatcher::start(desired.access.clone(), desired.node.clone(), Options::default());
            let mut state = watch.state();
            state.mark_changed();
            log::info!("watching the pods of node {}", desired.node);
            (desired.clone(), watch, state)
        });
    }

    /// Returns the node's name in the cluster, or `None` if there is no watch.
    pub fn node(&self) -> Option<&str> {
        self.watched.as_ref().map(|(desired, ..)| desired.node.as_str())
    }

    /// Returns the state of the watch, or `None` if there is no watch.
    pub fn state(&self) -> Option<WatchState> {
        self.watched.as_ref().map(|(.., state)| state.borrow().clone())
    }

    /// Waits for the next event. Cancel safe.
    pub async fn next(&mut self) -> ClusterEvent {
        let Some((_, watch, state)) = &mut self.watched else { return pending().await };
        tokio::select! {
            // Return a pod event before the state that followed from it.
            biased;
            Some(event) = watch.next() => ClusterEvent::Pods(event),
            Ok(()) = state.changed() => ClusterEvent::State(state.borrow_and_update().clone()),
            else => pending().await,
        }
    }
}
