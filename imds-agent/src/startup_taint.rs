//! The taint that keeps pods off a node until it is guarded: whoever makes nodes sets it, and the agent takes it off.

use std::time::Duration;

use tokio::time::sleep;

use crate::{
    cluster::Wanted,
    datapath::pins::PinDir,
    kube::{Attempts, Backoff, NodeTaints, TaintError},
    node::netlink::Netlink,
    status,
};

/// How often it is looked whether all is guarded.
const PERIOD: Duration = Duration::from_secs(1);

/// Waits until all that is to be guarded is, as `/readyz` has it, and takes the taint with this key off the node. Tries until
/// it is gone: meanwhile the node gets no pods, but none is let through.
pub async fn take_off(wanted: Wanted, key: String, pins: PinDir, netlink: Netlink) {
    while !is_ready(&pins, &netlink).await {
        sleep(PERIOD).await;
    }
    let mut attempts = Attempts::new(Backoff::default());
    loop {
        let error = match try_take_off(&wanted, &key).await {
            Ok(true) => return log::info!("took the taint {key} off node {}", wanted.node),
            Ok(false) => return log::info!("node {} has no taint {key}", wanted.node),
            Err(error) => error,
        };
        let pause = attempts.failed(error.retry_after());
        log::error!(
            "can't take the taint {key} off node {}, which gets no pods until then: {:#}",
            wanted.node,
            anyhow::Error::from(error)
        );
        sleep(pause).await;
    }
}

async fn is_ready(pins: &PinDir, netlink: &Netlink) -> bool {
    status::gather(pins, netlink).await.is_ok_and(|report| report.uncovered().is_empty())
}

/// Whether it was there.
async fn try_take_off(wanted: &Wanted, key: &str) -> Result<bool, TaintError> {
    let node = NodeTaints::new(&wanted.access, &wanted.node).await?;
    node.remove(key).await
}
