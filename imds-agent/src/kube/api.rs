//! Requests to the API server.

use std::{path::PathBuf, time::Duration};

use bytes::BytesMut;
use http::{Method, Request, StatusCode, header, request::Builder};
use http_body_util::BodyExt as _;
use kube_client::{
    Client, Config as ClientConfig,
    client::Body,
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::Value;
use tokio::time::timeout;

use super::{
    api_error::{ApiError, with_causes},
    pod_list::{Page, ResourceVersionMatch, Status, WatchEvent},
};
use crate::config::Access;

/// Longest answer in bytes. etcd stores no object of more than 1.5 MiB, and a page lists few pods.
const MAX_ANSWER: usize = 64 << 20;
/// Longest line of a watch in bytes.
const MAX_LINE: usize = 8 << 20;
/// URL path of all pods.
pub(super) const PODS: &str = "/api/v1/pods";
/// Name of the agent in the audit log of the API server.
const USER_AGENT: &str = concat!("imds-agent/", env!("CARGO_PKG_VERSION"));
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(30);

/// Client of the API server for the pods of one node.
#[derive(Clone)]
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
        let response =
            timeout(RESPONSE_TIMEOUT, async { read(self.send(request, body).await?, MAX_LINE).await });
        let response = response.await.map_err(|_| ApiError::Timeout { after: RESPONSE_TIMEOUT })??;
        serde_json::from_slice(&response).map_err(|source| ApiError::Malformed { source })
    }

    async fn get(&self, query: &[(&str, &str)]) -> Result<Body, ApiError> {
        self.send(Request::get(self.target(query)), Body::empty()).await
    }

    async fn send(&self, request: Builder, body: Body) -> Result<Body, ApiError> {
        let request = request
            .header(header::ACCEPT, "application/json")
            .header(header::USER_AGENT, USER_AGENT)
            .body(body)
            .map_err(|source| ApiError::Client { source: Box::new(kube_client::Error::HttpError(source)) })?;
        let response = self.client.send(request).await;
        let response = response.map_err(|source| ApiError::Unreachable { source: Box::new(source) })?;
        if response.status() == StatusCode::OK {
            return Ok(response.into_body());
        }
        let code = response.status().as_u16();
        let header =
            response.headers().get(header::RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
        let body = read(response.into_body(), MAX_LINE).await.unwrap_or_default();
        let mut status: Status = serde_json::from_slice(&body)
            .unwrap_or_else(|_| Status::from_text(String::from_utf8_lossy(&body).into_owned()));
        status.code = code;
        if let Some(seconds) = header {
            status.set_retry_after(seconds);
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
    use super::{super::api_error::ErrorKind, *};

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
}
