//! Pod lists and watch events: JSON of the API server.

use serde::Deserialize;

use super::{
    api_error::{ApiError, ErrorKind, Status},
    pod::{Pod, PodObject},
};

/// Change of the node's pods.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum PodEvent {
    /// Complete list of the pods.
    Relist(Vec<Pod>),
    /// A pod was created or changed.
    Apply(Pod),
    /// A pod was deleted, or left the node.
    Delete {
        /// UID of the deleted pod.
        uid: String,
    },
}

impl PodEvent {
    /// Parses a line of a watch. Returns `None` if it does not concern a pod of `node`.
    pub fn from_line(json: &[u8], node: &str) -> Result<Option<Self>, ErrorKind> {
        let event = WatchEvent::from_json(json).and_then(|event| event.into_event(node));
        event.map(|(event, _)| event).map_err(|error| error.kind())
    }

    /// Parses a list of one page, and keeps the pods of `node`.
    pub fn from_list(json: &[u8], node: &str) -> Result<Self, ErrorKind> {
        let page = Page::from_json(json).and_then(|page| page.into_parts(node));
        page.map(|(pods, ..)| Self::Relist(pods)).map_err(|error| error.kind())
    }
}

/// Page of a pod list.
#[derive(Deserialize)]
pub(super) struct Page {
    metadata: ListMetadata,
    // Go writes null for an empty list.
    items: Option<Vec<PodObject>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ListMetadata {
    resource_version: Option<String>,
    r#continue: Option<String>,
}

impl Page {
    pub(super) fn from_json(json: &[u8]) -> Result<Self, ApiError> {
        serde_json::from_slice(json).map_err(|source| ApiError::Malformed { source })
    }

    /// Returns the pods of `node`, the resource version of the list, and the continue token of the next page if there
    /// is one.
    pub(super) fn into_parts(self, node: &str) -> Result<(Vec<Pod>, String, Option<String>), ApiError> {
        let version = require_version(self.metadata.resource_version)?;
        let pods = self.items.into_iter().flatten().filter(|pod| pod.is_on(node)).map(PodObject::into_pod);
        Ok((pods.collect(), version, self.metadata.r#continue.filter(|next| !next.is_empty())))
    }
}

fn require_version(version: Option<String>) -> Result<String, ApiError> {
    let version = version.filter(|version| !version.is_empty());
    version.ok_or(ApiError::Incomplete { what: "resourceVersion" })
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

#[derive(Deserialize)]
pub(super) struct Bookmark {
    metadata: ListMetadata,
}

impl WatchEvent {
    pub(super) fn from_json(json: &[u8]) -> Result<Self, ApiError> {
        serde_json::from_slice(json).map_err(|source| ApiError::Malformed { source })
    }

    /// Converts to an event about a pod of `node`, if it is one, and the new resource version.
    pub(super) fn into_event(self, node: &str) -> Result<(Option<PodEvent>, String), ApiError> {
        let (version, event) = match self {
            Self::Added(pod) | Self::Modified(pod) if pod.is_on(node) => {
                (pod.resource_version(), Some(PodEvent::Apply(pod.into_pod())))
            }
            Self::Added(pod) | Self::Modified(pod) | Self::Deleted(pod) => {
                (pod.resource_version(), Some(PodEvent::Delete { uid: pod.into_pod().uid }))
            }
            Self::Bookmark(bookmark) => (bookmark.metadata.resource_version, None),
            Self::Error(status) => return Err(status.into_error(None)),
        };
        Ok((event, require_version(version)?))
    }
}
