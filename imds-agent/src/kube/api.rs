//! Requests to the API server, their answers, and their errors.

use std::{error::Error, path::PathBuf, time::Duration};

use bytes::BytesMut;
use http::{Method, Request, StatusCode, header, request::Builder};
use http_body_util::BodyExt as _;
use kube_client::{
    Client, Config as ClientConfig,
    client::Body,
    config::{InClusterError, KubeConfigOptions, Kubeconfig, KubeconfigError},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use thiserror::Error;
use tokio::time::timeout;

use super::{
    pod::{Pod, PodObject},
    reflector::PodEvent,
};
use crate::config::Access;

/// Longest answer in bytes. etcd stores no object of more than 1.5 MiB, and a page lists few pods.
const MAX_ANSWER: usize = 64 << 20;
/// Longest line of a watch in bytes.
const MAX_LINE: usize = 8 << 20;
/// Upper bound of the `Retry-After` time that the agent respects.
const MAX_RETRY_AFTER: Duration = Duration::from_mins(5);
/// URL path of all pods.
pub(super) const PODS: &str = "/api/v1/pods";
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Error of a request to the API server.
#[derive(Debug, Error)]
pub(super) enum ApiError {
    #[error("failed to read the kubeconfig {}", path.display())]
    Kubeconfig { path: PathBuf, source: Box<KubeconfigError> },
    #[error("failed to find the API server from within the cluster")]
    InCluster { source: InClusterError },
    #[error("failed to create a client of the API server")]
    Client { source: Box<kube_client::Error> },
    #[error("failed to reach the API server")]
    Unreachable { source: Box<kube_client::Error> },
    #[error("the API server did not answer within {after:?}")]
    Timeout { after: Duration },
    #[error("the API server closed the connection during an answer")]
    ConnectionClosed { source: Option<Box<kube_client::Error>> },
    #[error("the API server no longer has the requested resource version: {message}")]
    Expired { message: String },
    #[error("the API server throttles requests")]
    Throttled { retry_after: Option<Duration> },
    #[error("the API server denied the request ({code}): {message}")]
    Forbidden { code: u16, message: String },
    #[error("the API server returned an error ({code}): {message}")]
    Failed { code: u16, message: String },
    #[error("failed to parse the answer of the API server")]
    Malformed { source: serde_json::Error },
    #[error("the answer of the API server has no {what}")]
    Incomplete { what: &'static str },
    #[error("the answer of the API server is longer than {limit} bytes")]
    TooLong { limit: usize },
    #[error("the pod list of the API server is too long: {pods} pods of this node in {pages} pages")]
    ListTooLong { pages: usize, pods: usize },
}

/// Kinds of errors, as metrics count them.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The configuration of the API client is missing or invalid.
    Config,
    /// The API server cannot be reached.
    Connect,
    /// The API server does not answer in time.
    Timeout,
    /// The API server closed the connection before the end of an answer.
    Closed,
    /// The API server no longer has the requested resource version (410).
    Expired,
    /// The API server asks to retry later (429).
    Throttled,
    /// The API server does not allow the agent to read pods (401, 403).
    Forbidden,
    /// The API server returned another error.
    Server,
    /// The API server sent an invalid answer.
    Malformed,
}

impl ErrorKind {
    /// Returns the name in metrics and JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Config => "config",
            Self::Connect => "connect",
            Self::Timeout => "timeout",
            Self::Closed => "closed",
            Self::Expired => "gone",
            Self::Throttled => "throttled",
            Self::Forbidden => "refused",
            Self::Server => "server",
            Self::Malformed => "malformed",
        }
    }
}

impl ApiError {
    pub(super) fn kind(&self) -> ErrorKind {
        match self {
            Self::Kubeconfig { .. } | Self::InCluster { .. } | Self::Client { .. } => ErrorKind::Config,
            Self::Unreachable { .. } => ErrorKind::Connect,
            Self::Timeout { .. } => ErrorKind::Timeout,
            Self::ConnectionClosed { .. } => ErrorKind::Closed,
            Self::Expired { .. } => ErrorKind::Expired,
            Self::Throttled { .. } => ErrorKind::Throttled,
            Self::Forbidden { .. } => ErrorKind::Forbidden,
            Self::Failed { .. } => ErrorKind::Server,
            Self::Malformed { .. }
            | Self::Incomplete { .. }
            | Self::TooLong { .. }
            | Self::ListTooLong { .. } => ErrorKind::Malformed,
        }
    }

    /// Returns the pause that the server requests before the next attempt.
    pub(super) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Throttled { retry_after } => retry_after.map(|pause| pause.min(MAX_RETRY_AFTER)),
            _ => None,
        }
    }
}

/// Returns the text of an error and of its causes. Skips a cause whose text is already included, because libraries
/// repeat their causes.
pub(super) fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text
}

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
    code: u16,
    message: String,
    details: Option<StatusDetails>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct StatusDetails {
    retry_after_seconds: Option<u64>,
}

impl Status {
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

/// Client of the API server for the pods of one node.
pub(super) struct Api {
    client: Client,
    /// URL of the server, without a trailing slash.
    server: String,
    node: String,
}

impl Api {
    pub(super) async fn new(access: &Access, node: &str) -> Result<Self, ApiError> {
        let mut config = match access {
            Access::InCluster => {
                ClientConfig::incluster().map_err(|source| ApiError::InCluster { source })?
            }
            Access::Kubeconfig(path) => from_kubeconfig(path.clone()).await?,
        };
        if config.root_cert.is_none()
            && (config.accept_invalid_certs || config.cluster_url.scheme_str() == Some("http"))
        {
            // No certificate is verified. Avoid loading the system's, which a minimal image does not have.
            config.root_cert = Some(Vec::new());
        }
        config.connect_timeout = Some(CONNECT_TIMEOUT);
        let server = config.cluster_url.to_string().trim_end_matches('/').to_owned();
        // The pod watch retries with its own backoff, and reports each attempt.
        config.default_retry = false;
        let client =
            Client::try_from(config).map_err(|source| ApiError::Client { source: Box::new(source) })?;
        Ok(Self { client, server, node: node.to_owned() })
    }

    /// Returns the text of an error of a request for `path`, with the URL and all causes.
    pub(super) fn describe(&self, path: &str, error: &ApiError) -> String {
        format!("{}{path}: {}", self.server, with_causes(error))
    }

    /// Requests a page of the pods of the node: the first one, or the one that starts at `next`.
    pub(super) async fn list(
        &self,
        since: &ResourceVersionMatch,
        limit: u32,
        next: Option<&str>,
    ) -> Result<Page, ApiError> {
        let limit = limit.to_string();
        let mut query = vec![("limit", limit.as_str())];
        match (next, since) {
            (Some(next), _) => query.push(("continue", next)),
            (None, ResourceVersionMatch::Any) => query.push(("resourceVersion", "0")),
            (None, ResourceVersionMatch::NotOlderThan(version)) => {
                query.extend([
                    ("resourceVersion", version.as_str()),
                    ("resourceVersionMatch", "NotOlderThan"),
                ]);
            }
            (None, ResourceVersionMatch::MostRecent) => {}
        }
        Page::from_json(&read(self.get(&query).await?, MAX_ANSWER).await?)
    }

    /// Starts a watch of changes after resource version `version`. The server ends the watch after `timeout`.
    pub(super) async fn watch(&self, version: &str, timeout: Duration) -> Result<Lines, ApiError> {
        let seconds = timeout.as_secs().max(1).to_string();
        let query = [
            ("watch", "true"),
            ("allowWatchBookmarks", "true"),
            ("timeoutSeconds", &seconds),
            ("resourceVersion", version),
        ];
        Ok(Lines { body: self.get(&query).await?, buffer: BytesMut::new(), searched: 0 })
    }

    /// Sends a request for the object at `target`, with an optional `patch` (RFC 6902). Returns the object in the
    /// answer.
    pub(super) async fn request(
        &self,
        method: Method,
        target: &str,
        patch: Option<&Value>,
    ) -> Result<Value, ApiError> {
        let request = Request::builder().method(method).uri(target);
        let request = request.header(header::CONTENT_TYPE, "application/json-patch+json");
        let body = patch.map_or_else(Body::empty, |patch| patch.to_string().into_bytes().into());
        let answer = timeout(ANSWER_TIMEOUT, async { read(self.send(request, body).await?, MAX_LINE).await });
        let answer = answer.await.map_err(|_| ApiError::Timeout { after: ANSWER_TIMEOUT })??;
        serde_json::from_slice(&answer).map_err(|source| ApiError::Malformed { source })
    }

    async fn get(&self, query: &[(&str, &str)]) -> Result<Body, ApiError> {
        self.send(Request::get(self.target(query)), Body::empty()).await
    }

    async fn send(&self, request: Builder, body: Body) -> Result<Body, ApiError> {
        let request = request
            .header(header::ACCEPT, "application/json")
            .body(body)
            .map_err(|source| ApiError::Client { source: Box::new(kube_client::Error::HttpError(source)) })?;
        let answer = self.client.send(request).await;
        let answer = answer.map_err(|source| ApiError::Unreachable { source: Box::new(source) })?;
        if answer.status() == StatusCode::OK {
            return Ok(answer.into_body());
        }
        let code = answer.status().as_u16();
        let header =
            answer.headers().get(header::RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
        let body = read(answer.into_body(), MAX_LINE).await.unwrap_or_default();
        // A proxy may answer in place of the API server, without a `Status` object.
        let mut status: Status = serde_json::from_slice(&body).unwrap_or_else(|_| Status {
            message: String::from_utf8_lossy(&body).into_owned(),
            ..Status::default()
        });
        status.code = code;
        if let Some(seconds) = header {
            status.details = Some(StatusDetails { retry_after_seconds: Some(seconds) });
        }
        Err(status.into_error())
    }

    fn target(&self, query: &[(&str, &str)]) -> String {
        let path = format!("{PODS}?");
        let length = path.len();
        form_urlencoded::Serializer::for_suffix(path, length)
            .append_pair("fieldSelector", &format!("spec.nodeName={}", self.node))
            .extend_pairs(query)
            .finish()
    }
}

async fn from_kubeconfig(path: PathBuf) -> Result<ClientConfig, ApiError> {
    let read = async || {
        let options = KubeConfigOptions::default();
        ClientConfig::from_custom_kubeconfig(Kubeconfig::read_from(&path)?, &options).await
    };
    read().await.map_err(|source| ApiError::Kubeconfig { path: path.clone(), source: Box::new(source) })
}

/// Answer to a watch request, read line by line.
pub(super) struct Lines {
    body: Body,
    buffer: BytesMut,
    /// Length of the prefix of the buffer that contains no newline.
    searched: usize,
}

impl Lines {
    /// Waits for the next event. Returns `None` if the server ended the watch.
    ///
    /// Cancel safe.
    pub(super) async fn next(&mut self) -> Result<Option<WatchEvent>, ApiError> {
        loop {
            if let Some(line) = self.line() {
                if line.trim_ascii().is_empty() {
                    continue;
                }
                return WatchEvent::from_json(&line).map(Some);
            }
            if self.buffer.len() > MAX_LINE {
                return Err(ApiError::TooLong { limit: MAX_LINE });
            }
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.buffer.extend_from_slice(&data);
                    }
                }
                Some(Err(source)) => {
                    return Err(ApiError::ConnectionClosed { source: Some(Box::new(source)) });
                }
                None if self.buffer.is_empty() => return Ok(None),
                None => return Err(ApiError::ConnectionClosed { source: None }),
            }
        }
    }

    fn line(&mut self) -> Option<BytesMut> {
        let unsearched = self.buffer.get(self.searched..).unwrap_or_default();
        let Some(end) = unsearched.iter().position(|&byte| byte == b'\n') else {
            self.searched = self.buffer.len();
            return None;
        };
        let line = self.buffer.split_to(self.searched + end + 1);
        self.searched = 0;
        Some(line)
    }
}

async fn read(mut body: Body, limit: usize) -> Result<Vec<u8>, ApiError> {
    let mut bytes = Vec::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|source| ApiError::ConnectionClosed { source: Some(Box::new(source)) })?;
        if let Ok(data) = frame.into_data() {
            bytes.extend_from_slice(&data);
        }
        if bytes.len() > limit {
            return Err(ApiError::TooLong { limit });
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str) -> Lines {
        Lines { body: Body::from(text.as_bytes().to_vec()), buffer: BytesMut::new(), searched: 0 }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn watch_is_read_by_line() {
        let bookmark = r#"{"type":"BOOKMARK","object":{"kind":"Pod","metadata":{"resourceVersion":"7"}}}"#;
        let pod = r#"{"type":"ADDED","object":{"metadata":{"uid":"u","namespace":"n","name":"p"}}}"#;
        let mut two = lines(&format!("{bookmark}\n\n{pod}\n"));
        assert!(matches!(two.next().await.unwrap(), Some(WatchEvent::Bookmark(_))));
        assert!(matches!(two.next().await.unwrap(), Some(WatchEvent::Added(_))));
        assert!(two.next().await.unwrap().is_none());

        let kind = async |text: &str| lines(text).next().await.err().unwrap().kind();
        assert_eq!(kind(&pod[..40]).await, ErrorKind::Closed);
        assert_eq!(kind(&format!("{}\n", &pod[..40])).await, ErrorKind::Malformed);
        assert_eq!(kind("{\"type\":\"MOVED\",\"object\":{}}\n").await, ErrorKind::Malformed);
        let endless = "x".repeat(MAX_LINE + 1);
        assert!(matches!(lines(&endless).next().await, Err(ApiError::TooLong { .. })));
    }

    #[test]
    fn error_causes_are_not_repeated() {
        #[derive(Debug, Error)]
        #[error("{text}")]
        struct Link {
            text: &'static str,
            source: Option<Box<Self>>,
        }
        let refused = Link { text: "connection refused", source: None };
        let connect = Link { text: "client error (Connect)", source: Some(Box::new(refused)) };
        let again = Link { text: "client error (Connect)", source: Some(Box::new(connect)) };
        let service = Link { text: "ServiceError: client error (Connect)", source: Some(Box::new(again)) };
        assert_eq!(with_causes(&service), "ServiceError: client error (Connect): connection refused");
    }

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
