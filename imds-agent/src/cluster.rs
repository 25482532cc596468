//! The connection to the cluster that the configuration wants.

use std::future::pending;

use tokio::sync::watch::Receiver;

use crate::{
    config::Access,
    kube::{Options, PodEvent, Watch, WatchState},
};

/// How pods are to be looked up.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Wanted {
    /// The way to the API server.
    pub access: Access,
    /// The node's name in the cluster.
    pub node: String,
}

/// What is heard of the cluster.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum News {
    /// Of this node's pods.
    Pods(PodEvent),
    /// Of the connection.
    State(WatchState),
}

/// A watch of this node's pods, where one is wanted.
#[derive(Debug, Default)]
pub struct Cluster {
    watched: Option<(Wanted, Watch, Receiver<WatchState>)>,
}

impl Cluster {
    /// Makes this what is watched. Must be called within a tokio runtime.
    pub fn follow(&mut self, wanted: Option<&Wanted>) {
        if self.watched.as_ref().map(|(wanted, ..)| wanted) == wanted {
            return;
        }
        self.watched = wanted.map(|wanted| {
            let watch = Watch::start(wanted.access.clone(), Options::new(wanted.node.clone()));
            let mut state = watch.state();
            state.mark_changed();
            log::info!("following the pods of node {}", wanted.node);
            (wanted.clone(), watch, state)
        });
    }

    /// The node's name in the cluster, where it is followed.
    #[must_use]
    pub fn node(&self) -> Option<&str> {
        self.watched.as_ref().map(|(wanted, ..)| wanted.node.as_str())
    }

    /// How the watch goes, where there is one.
    #[must_use]
    pub fn state(&self) -> Option<WatchState> {
        self.watched.as_ref().map(|(.., state)| state.borrow().clone())
    }

    /// What is heard next. Nothing is lost when this is cancelled.
    pub async fn next(&mut self) -> News {
        let Some((_, watch, state)) = &mut self.watched else { return pending().await };
        tokio::select! {
            // A pod before the state that it came to.
            biased;
            Some(event) = watch.next() => News::Pods(event),
            Ok(()) = state.changed() => News::State(state.borrow_and_update().clone()),
            else => pending().await,
        }
    }
}
