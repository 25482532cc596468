//! Metrics of an agent, through the proxy of the API server.

use futures_util::AsyncReadExt as _;

use super::{Api, ApiError, get};

/// Longest exposition in bytes.
const MAX_METRICS: usize = 4 << 20;

impl Api {
    /// Requests the metrics of a pod that serves them at `port`.
    pub(crate) async fn metrics(&self, namespace: &str, pod: &str, port: u16) -> Result<String, ApiError> {
        let target = format!("/api/v1/namespaces/{namespace}/pods/{pod}:{port}/proxy/metrics");
        self.with_timeout(async || {
            let body = Box::pin(self.client.request_stream(get(&target, "text/plain")?).await?);
            let mut text = Vec::new();
            let limit = u64::try_from(MAX_METRICS).unwrap_or(u64::MAX);
            let read = body.take(limit + 1).read_to_end(&mut text).await;
            if read.map_err(|source| ApiError::Read { source })? > MAX_METRICS {
                return Err(ApiError::TooLong { limit: MAX_METRICS });
            }
            Ok(String::from_utf8_lossy(&text).into_owned())
        })
        .await
    }
}
