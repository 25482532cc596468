//! Removal of a taint from a node.

use std::time::Duration;

use http::Method;
use serde_json::{Value, json};

use super::{
    api::Api,
    api_error::{ApiError, with_causes},
};
use crate::config::Access;

const RESPONSE_TIMEOUT: Duration = Duration::from_secs(30);

/// Reason why a taint could not be removed.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
pub struct TaintError {
    text: String,
    /// Pause that the server requests before the next attempt.
    pub retry_after: Option<Duration>,
}

/// Removes all taints with this key from a node. Returns whether there was one.
///
/// # Errors
///
/// Fails if another client changed the taints concurrently. The taints then stay as they are.
pub async fn remove_taint(access: &Access, node: &str, key: &str) -> Result<bool, TaintError> {
    let api = Api::new(access, node, RESPONSE_TIMEOUT).await;
    let api = api.map_err(|error| TaintError { text: with_causes(&error), retry_after: None })?;
    // Node names need no escaping (RFC 1123).
    let target = format!("/api/v1/nodes/{node}");
    let failed = |error: ApiError| TaintError {
        text: api.describe(&target, &error),
        retry_after: error.retry_after(),
    };
    let node = api.request(Method::GET, &target, None).await.map_err(failed)?;
    let patch = node.pointer("/spec/taints").and_then(|taints| patch(taints, key));
    let Some(patch) = patch else { return Ok(false) };
    api.request(Method::PATCH, &target, Some(&patch)).await.map_err(failed)?;
    Ok(true)
}

/// Returns the patch (RFC 6902) that removes the taints with `key`. The patch fails if the taints changed in the
/// meantime.
fn patch(taints: &Value, key: &str) -> Option<Value> {
    let all = taints.as_array()?;
    let left: Vec<_> = all.iter().filter(|taint| taint.get("key").is_none_or(|its| its != key)).collect();
    (left.len() < all.len()).then(|| {
        json!([
            { "op": "test", "path": "/spec/taints", "value": taints },
            { "op": "replace", "path": "/spec/taints", "value": left },
        ])
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_matching_taint_is_removed() {
        let taints = json!([{ "key": "a", "effect": "NoSchedule" }, { "key": "b", "effect": "NoExecute" }]);
        let patch = patch(&taints, "a").unwrap();
        assert_eq!(patch[0]["value"], taints);
        assert_eq!(patch[1]["value"], json!([{ "key": "b", "effect": "NoExecute" }]));
        assert_eq!(super::patch(&taints, "c"), None);
        assert_eq!(super::patch(&Value::Null, "a"), None);
    }
}
