//! Labels of the node, which choose its pool of the configuration.

use std::{future::pending, time::Duration};

use tokio::{
    sync::watch,
    task::JoinSet,
    time::{sleep, timeout},
};

use super::{Backoff, ClusterClient, cluster::ApiConfig};
use crate::config::node_pool::Labels;

/// Interval of the requests. A watch would transfer the node with each heartbeat of the kubelet.
const PERIOD: Duration = Duration::from_mins(10);

/// Follows the labels of the node until it is dropped.
#[derive(Debug)]
pub struct NodeLabels {
    api: ApiConfig,
    labels: watch::Receiver<Option<Labels>>,
    /// The task of the requests, which ends when this is dropped.
    _task: JoinSet<()>,
}

impl NodeLabels {
    /// Starts the requests. Must be called within a tokio runtime.
    pub fn start(api: ApiConfig) -> Self {
        let (sender, labels) = watch::channel(None);
        let client = ClusterClient::new(api.clone());
        Self { api, labels, _task: JoinSet::from_iter([follow(client, sender)]) }
    }

    /// Returns the API server and the node.
    pub fn api(&self) -> &ApiConfig {
        &self.api
    }

    /// Waits for other labels than the last ones that this method returned. Cancel safe.
    pub async fn changed(&mut self) -> Labels {
        loop {
            if self.labels.changed().await.is_err() {
                // The task ends only together with this value.
                return pending().await;
            }
            if let Some(labels) = self.labels.borrow_and_update().clone() {
                return labels;
            }
        }
    }

    /// Returns the first labels, or `None` if the API server does not send them within `limit`.
    pub async fn first(&mut self, limit: Duration) -> Option<Labels> {
        timeout(limit, self.changed()).await.ok()
    }
}

async fn follow(mut client: ClusterClient, labels: watch::Sender<Option<Labels>>) {
    let (mut backoff, mut last_error) = (Backoff::default(), None);
    loop {
        let error = match client.node_labels().await {
            Ok(read) => {
                (backoff, last_error) = (Backoff::default(), None);
                labels.send_if_modified(|known| {
                    let read = Some(read);
                    let is_new = *known != read;
                    *known = read;
                    is_new
                });
                sleep(PERIOD).await;
                continue;
            }
            Err(error) => error,
        };
        let (text, delay) = (error.to_string(), backoff.next_delay(error.retry_after));
        if last_error.as_ref() != Some(&text) {
            log::warn!(
                "failed to read the labels of node {}, which choose its node_pool: {text}",
                client.node()
            );
            last_error = Some(text);
        }
        sleep(delay).await;
    }
}
