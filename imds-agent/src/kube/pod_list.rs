//! JSON of the API server: pages of a pod list, events of a pod watch, and status objects.

use std::time::Duration;

use serde::Deserialize;

use super::{
    api_error::ApiError,
    pod::{Pod, PodObject},
    reflector::PodEvent,
};

/// Resource version that a list must have at least (`resourceVersionMatch`).
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum ResourceVersionMatch {
    /// Any version that the server has cached, which is the cheapest.
    Any,
    /// This version or a newer one.
    NotOlderThan(String),
    /// The most recent version, which requires a consistent read from etcd.
    MostRecent,
}

/// Page of a pod list.
pub(super) struct Page {
    pods: Vec<PodObject>,
    pub(super) resource_version: String,
    /// Continue token of the next page, or `None` for the last page.
    pub(super) next: Option<String>,
}

impl Page {
    pub(super) fn from_json(json: &[u8]) -> Result<Self, ApiError> {
        #[derive(Deserialize)]
        struct List {
            metadata: ListMetadata,
            // Go writes null for an empty list.
            items: Option<Vec<PodObject>>,
        }
        let list: List = serde_json::from_slice(json).map_err(|source| ApiError::Malformed { source })?;
        let resource_version = list.metadata.resource_version.filter(|version| !version.is_empty());
        Ok(Self {
            pods: list.items.unwrap_or_default(),
            resource_version: resource_version.ok_or(ApiError::Incomplete { what: "resourceVersion" })?,
            next: list.metadata.r#continue.filter(|next| !next.is_empty()),
        })
    }

    /// Returns the pods of the page that run on `node`.
    pub(super) fn pods_of(self, node: &str) -> impl Iterator<Item = Pod> {
        self.pods.into_iter().filter(move |pod| pod.is_on(node)).map(PodObject::into_pod)
    }
}

/// Event of a pod watch.
#[derive(Deserialize)]
#[serde(tag = "type", content = "object", rename_all = "UPPERCASE")]
pub(super) enum WatchEvent {
    Added(PodObject),
    Modified(PodObject),
    Deleted(PodObject),
    Bookmark(Bookmark),
    Error(Status),
}

impl WatchEvent {
    pub(super) fn from_json(json: &[u8]) -> Result<Self, ApiError> {
        serde_json::from_slice(json).map_err(|source| ApiError::Malformed { source })
    }

    /// Converts to an event about a pod of `node`, if it is one, and the new resource version.
    pub(super) fn into_event(self, node: &str) -> Result<(Option<PodEvent>, String), ApiError> {
        let (event, version) = match self {
            Self::Added(pod) | Self::Modified(pod) if pod.is_on(node) => {
                let version = pod.resource_version().map(str::to_owned);
                (Some(PodEvent::Apply(pod.into_pod())), version)
            }
            Self::Added(pod) | Self::Modified(pod) | Self::Deleted(pod) => {
                let version = pod.resource_version().map(str::to_owned);
                (Some(PodEvent::Delete { uid: pod.into_pod().uid }), version)
            }
            Self::Bookmark(bookmark) => (None, bookmark.metadata.resource_version),
            Self::Error(status) => return Err(status.into_error()),
        };
        Ok((event, version.ok_or(ApiError::Incomplete { what: "resourceVersion" })?))
    }
}

#[derive(Deserialize)]
pub(super) struct Bookmark {
    metadata: ListMetadata,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ListMetadata {
    resource_version: Option<String>,
    r#continue: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct Status {
    pub(super) code: u16,
    message: String,
    details: Option<StatusDetails>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct StatusDetails {
    retry_after_seconds: Option<u64>,
}

impl Status {
    /// Returns the status of an answer that is no `Status` object, as of a proxy in front of the API server.
    pub(super) fn from_text(message: String) -> Self {
        Self { message, ..Self::default() }
    }

    /// Sets the pause before the next attempt, as the header `Retry-After` has it.
    pub(super) fn set_retry_after(&mut self, seconds: u64) {
        self.details = Some(StatusDetails { retry_after_seconds: Some(seconds) });
    }

    pub(super) fn into_error(self) -> ApiError {
        let seconds = self.details.and_then(|details| details.retry_after_seconds);
        let Self { code, message, .. } = self;
        let line = message.lines().next().unwrap_or_default();
        let message: String = line.chars().filter(|char| !char.is_control()).take(200).collect();
        match code {
            410 => ApiError::Expired { message },
            // A server whose etcd was restored from a backup no longer has newer versions.
            _ if message.contains("Too large resource version") => ApiError::Expired { message },
            429 => ApiError::Throttled { retry_after: seconds.map(Duration::from_secs) },
            401 | 403 => ApiError::Forbidden { code, message },
            _ => ApiError::Failed { code, message },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::api_error::{ErrorKind, MAX_RETRY_AFTER},
        *,
    };

    #[test]
    fn status_errors_name_the_remedy() {
        let kind = |json: &str| serde_json::from_str::<Status>(json).unwrap().into_error().kind();
        assert_eq!(kind(r#"{"code":410,"message":"too old resource version"}"#), ErrorKind::Expired);
        assert_eq!(
            kind(r#"{"code":504,"message":"Timeout: Too large resource version: 9"}"#),
            ErrorKind::Expired
        );
        assert_eq!(kind(r#"{"code":403}"#), ErrorKind::Forbidden);
        assert_eq!(kind(r#"{"code":500,"message":"etcd"}"#), ErrorKind::Server);
        let throttled = r#"{"code":429,"details":{"retryAfterSeconds":9999}}"#;
        let error = serde_json::from_str::<Status>(throttled).unwrap().into_error();
        assert_eq!(error.retry_after(), Some(MAX_RETRY_AFTER));
    }
}
