//! Startup taint: keeps pods off a node until its interfaces are enforced. The creator of the node sets it, and the
//! agent removes it.

use std::time::Duration;

use tokio::time::sleep;

use crate::{
    datapath::pin::dir::PinDir,
    kube::{Backoff, ClusterClient, cluster::ApiConfig},
    node::netlink::Netlink,
    telemetry::status,
};

/// Interval of the readiness check.
const PERIOD: Duration = Duration::from_secs(1);

/// Waits until the node is ready, as `/readyz` defines it, and removes the taint with this key from the node. Retries
/// until the taint is removed: until then, no pod is scheduled on the node.
pub async fn remove_startup_taint(api: ApiConfig, key: String, pins: PinDir, netlink: Netlink) {
    while !is_ready(&pins, &netlink).await {
        sleep(PERIOD).await;
    }
    let (mut writer, mut backoff) = (ClusterClient::new(api), Backoff::default());
    loop {
        let removed = writer.remove_taint(&key).await;
        let node = writer.node();
        let error = match removed {
            Ok(true) => return log::info!("removed the taint {key} from node {node}"),
            Ok(false) => return log::info!("node {node} has no taint {key}"),
            Err(error) => error,
        };
        let delay = backoff.next_delay(error.retry_after);
        log::error!(
            "failed to remove the taint {key} from node {node}, no pods are scheduled there until then: {:#}",
            anyhow::Error::from(error)
        );
        sleep(delay).await;
    }
}

async fn is_ready(pins: &PinDir, netlink: &Netlink) -> bool {
    status::gather_enforcement(pins, netlink).await.is_ok_and(|report| report.not_enforced().is_empty())
}
