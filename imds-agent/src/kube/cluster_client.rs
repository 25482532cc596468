//! Requests about single objects: Events, and the node.

use std::time::Duration;

use http::Method;
use jiff::Timestamp;
use serde_json::{Value, json};

use super::{
    api::Api,
    api_error::ApiError,
    cluster::ApiConfig,
    event_object::{EventSeries, NewEvent},
    taint,
};
use crate::{causes::with_causes, config::node_pool::Labels};

const RESPONSE_TIMEOUT: Duration = Duration::from_secs(30);
/// JSON Patch (RFC 6902).
const JSON_PATCH: &str = "application/json-patch+json";
/// JSON Merge Patch (RFC 7396).
const MERGE_PATCH: &str = "application/merge-patch+json";
/// Merge patch of Kubernetes, which merges lists of conditions by their type.
const STRATEGIC_MERGE_PATCH: &str = "application/strategic-merge-patch+json";

/// Reason why a request about an object failed.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
pub struct RequestError {
    text: String,
    /// Pause that the server requests before the next attempt.
    pub retry_after: Option<Duration>,
    /// HTTP status code of the answer; `None` without an answer.
    pub code: Option<u16>,
}

/// Condition of a node, as `kubectl describe node` shows it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Condition {
    /// Type of the condition.
    pub kind: &'static str,
    /// Value of the condition.
    pub is_true: bool,
    /// Reason in one CamelCase word.
    pub reason: &'static str,
    /// Reason in words.
    pub message: String,
}

/// Client that writes Events, and reads and changes the node. Reads the credentials with the first request, and again after errors.
pub struct ClusterClient {
    config: ApiConfig,
    api: Option<Api>,
}

impl ClusterClient {
    /// Returns a client for the API server and node of `config`.
    pub fn new(config: ApiConfig) -> Self {
        Self { config, api: None }
    }

    /// Returns the name of the node.
    pub fn node(&self) -> &str {
        &self.config.node
    }

    /// Creates an Event. Returns its name.
    ///
    /// # Errors
    ///
    /// Status code 403 means that the role is missing or that the namespace is being deleted, 404 that there is no such
    /// namespace.
    pub async fn create_event(&mut self, event: &NewEvent) -> Result<String, RequestError> {
        let target = event_target(event.namespace());
        let object = event.to_json(&self.config.node);
        match self.write(Method::POST, &target, "application/json", &object).await {
            // The name is unique: the server has stored the Event, but its answer was lost.
            Err(error) if error.code == Some(409) => Ok(event.name()),
            result => result.map(|_| event.name()),
        }
    }

    /// Updates the number of observations of an Event.
    ///
    /// # Errors
    ///
    /// Status code 404 means that the Event has expired.
    pub async fn update_event(
        &mut self,
        namespace: &str,
        name: &str,
        series: &EventSeries,
    ) -> Result<(), RequestError> {
        let target = format!("{}/{name}", event_target(namespace));
        let patch = json!({ "series": series.to_json() });
        self.write(Method::PATCH, &target, MERGE_PATCH, &patch).await.map(drop)
    }

    /// Returns the labels of the node.
    pub async fn node_labels(&mut self) -> Result<Labels, RequestError> {
        let node = self.get(&self.node_target()).await?;
        let labels = node.pointer("/metadata/labels").and_then(Value::as_object).into_iter().flatten();
        let text = |(key, value): (&String, &Value)| Some((key.clone(), value.as_str()?.to_owned()));
        Ok(labels.filter_map(text).collect())
    }

    /// Sets a condition of the node. Keeps the time of the last transition if the value stays.
    pub async fn set_condition(&mut self, condition: &Condition) -> Result<(), RequestError> {
        let target = format!("{}/status", self.node_target());
        let node = self.get(&target).await?;
        let Condition { kind, is_true, reason, message } = condition;
        let status = if *is_true { "True" } else { "False" };
        let conditions = node.pointer("/status/conditions").and_then(Value::as_array);
        let before = conditions.and_then(|all| all.iter().find(|other| other["type"] == *kind));
        let since =
            before.filter(|before| before["status"] == status).map(|before| &before["lastTransitionTime"]);
        let now = json!(format!("{:.0}", Timestamp::now()));
        let entry = json!({
            "type": kind, "status": status, "reason": reason, "message": message,
            "lastHeartbeatTime": now, "lastTransitionTime": since.unwrap_or(&now),
        });
        let patch = json!({ "status": { "conditions": [entry] } });
        self.write(Method::PATCH, &target, STRATEGIC_MERGE_PATCH, &patch).await.map(drop)
    }

    /// Removes all taints with this key from the node. Returns whether there was one.
    ///
    /// # Errors
    ///
    /// Fails if another client changed the taints concurrently. The taints then stay as they are.
    pub async fn remove_taint(&mut self, key: &str) -> Result<bool, RequestError> {
        let target = self.node_target();
        let node = self.get(&target).await?;
        let patch = node.pointer("/spec/taints").and_then(|taints| taint::removal(taints, key));
        let Some(patch) = patch else { return Ok(false) };
        self.write(Method::PATCH, &target, JSON_PATCH, &patch).await?;
        Ok(true)
    }

    fn node_target(&self) -> String {
        // Node names need no escaping (RFC 1123).
        format!("/api/v1/nodes/{}", self.config.node)
    }

    async fn get(&mut self, target: &str) -> Result<Value, RequestError> {
        let api = self.api().await?;
        let answer = api.get_object(target).await;
        answer.map_err(|error| self.failed(&api, target, &error))
    }

    async fn write(
        &mut self,
        method: Method,
        target: &str,
        media_type: &'static str,
        body: &Value,
    ) -> Result<Value, RequestError> {
        let api = self.api().await?;
        let answer = api.write(method, target, media_type, body).await;
        answer.map_err(|error| self.failed(&api, target, &error))
    }

    /// Describes an error. Discards the client unless the API server has accepted its credentials: the files that it was created from may
    /// have changed.
    fn failed(&mut self, api: &Api, target: &str, error: &ApiError) -> RequestError {
        let error = RequestError::new(api.describe(target, error), error);
        if matches!(error.code, None | Some(401 | 403)) {
            self.api = None;
        }
        error
    }

    async fn api(&mut self) -> Result<Api, RequestError> {
        if let Some(api) = &self.api {
            return Ok(api.clone());
        }
        let api = Api::new(&self.config.access, RESPONSE_TIMEOUT).await;
        let api = api.map_err(|error| RequestError::new(with_causes(&error), &error))?;
        Ok(self.api.insert(api).clone())
    }
}

impl RequestError {
    fn new(text: String, error: &ApiError) -> Self {
        Self { text, retry_after: error.retry_after(), code: error.code() }
    }
}

fn event_target(namespace: &str) -> String {
    // Names of namespaces need no escaping (RFC 1123).
    format!("/apis/events.k8s.io/v1/namespaces/{namespace}/events")
}
