//! Requests to the API server.

use std::{io, path::PathBuf, pin::Pin, time::Duration};

use futures_util::{AsyncBufRead, AsyncBufReadExt as _, AsyncReadExt as _, TryStreamExt as _};
use http::{Method, Request, header, request::Builder};
use http_body_util::BodyExt as _;
use kube_client::{
    Client, Config as ClientConfig,
    client::Body,
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::Value;
use tokio::time::timeout;

use super::{
    api_error::{ApiError, Status},
    resource::Collection,
};
use crate::{causes::with_causes, config::Access};

/// Longest answer in bytes. etcd stores no object of more than 1.5 MiB, and a page lists few objects.
const MAX_ANSWER: usize = 64 << 20;
/// Longest line of a watch in bytes.
const MAX_LINE: usize = 8 << 20;
const JSON: &str = "application/json";
/// Media types of lists and watch events with the metadata of the objects only. JSON of whole objects is the alternative.
const METADATA_LIST: &str =
    "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1,application/json";
const METADATA: &str = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1,application/json";
/// Name of the agent in the audit log of the API server.
const USER_AGENT: &str = concat!("imds-agent/", env!("CARGO_PKG_VERSION"));
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Client of the API server.
#[derive(Clone)]
pub(super) struct Api {
    client: Client,
    /// URL of the server, without a trailing slash.
    server: String,
    response_timeout: Duration,
}

impl Api {
    pub(super) async fn new(access: &Access, response_timeout: Duration) -> Result<Self, ApiError> {
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
        // A watch retries with its own backoff, and reports each attempt.
        config.default_retry = false;
        let client =
            Client::try_from(config).map_err(|source| ApiError::Client { source: Box::new(source) })?;
        Ok(Self { client, server, response_timeout })
    }

    /// Returns the text of an error of a request for `path`, with the URL and all causes.
    pub(super) fn describe(&self, path: &str, error: &ApiError) -> String {
        format!("{}{path}: {}", self.server, with_causes(error))
    }

    /// Requests a page of objects as JSON: the first one, or the one that starts at `next`. The list is at least as new as resource
    /// version `version`. As in client-go, "0" accepts any version that the server has cached, which is the cheapest, and an
    /// empty version requires a consistent read from etcd. Servers ignore `limit` for "0": such a list is a single page.
    pub(super) async fn list(
        &self,
        objects: &Collection,
        version: &str,
        limit: u32,
        next: Option<&str>,
    ) -> Result<Vec<u8>, ApiError> {
        let limit = limit.to_string();
        let mut query = vec![("limit", limit.as_str())];
        match (next, version) {
            (Some(next), _) => query.push(("continue", next)),
            (None, "") => {}
            (None, "0") => query.push(("resourceVersion", "0")),
            (None, _) => {
                query.extend([("resourceVersion", version), ("resourceVersionMatch", "NotOlderThan")]);
            }
        }
        let accept = if objects.metadata_only { METADATA_LIST } else { JSON };
        let page = async { read(self.get(objects, &query, accept).await?, MAX_ANSWER).await };
        self.with_timeout(page).await
    }

    /// Starts a watch of changes after resource version `version`. The server ends the watch after `timeout`.
    pub(super) async fn watch(
        &self,
        objects: &Collection,
        version: &str,
        timeout: Duration,
    ) -> Result<Lines, ApiError> {
        let seconds = timeout.as_secs().max(1).to_string();
        let query = [
            ("watch", "true"),
            ("allowWatchBookmarks", "true"),
            ("timeoutSeconds", &seconds),
            ("resourceVersion", version),
        ];
        let accept = if objects.metadata_only { METADATA } else { JSON };
        let body = self.with_timeout(self.get(objects, &query, accept)).await?;
        Ok(Lines(Box::pin(body.into_data_stream().map_err(io::Error::other).into_async_read())))
    }

    /// Requests the object at `target`.
    pub(super) async fn get_object(&self, target: &str) -> Result<Value, ApiError> {
        self.receive(Request::get(target).header(header::ACCEPT, JSON), Body::empty()).await
    }

    /// Creates or patches the object at `target` with the JSON text `body` of a media type. Returns the object.
    pub(super) async fn write(
        &self,
        method: Method,
        target: &str,
        media_type: &'static str,
        body: &Value,
    ) -> Result<Value, ApiError> {
        let request = Request::builder().method(method).uri(target).header(header::ACCEPT, JSON);
        let request = request.header(header::CONTENT_TYPE, media_type);
        self.receive(request, body.to_string().into_bytes().into()).await
    }

    async fn receive(&self, request: Builder, body: Body) -> Result<Value, ApiError> {
        let response = async { read(self.send(request, body).await?, MAX_LINE).await };
        let response = self.with_timeout(response).await?;
        serde_json::from_slice(&response).map_err(|source| ApiError::Malformed { source })
    }

    async fn with_timeout<T>(
        &self,
        response: impl Future<Output = Result<T, ApiError>>,
    ) -> Result<T, ApiError> {
        let after = self.response_timeout;
        timeout(after, response).await.unwrap_or(Err(ApiError::Timeout { after }))
    }

    async fn get(
        &self,
        objects: &Collection,
        query: &[(&str, &str)],
        accept: &str,
    ) -> Result<Body, ApiError> {
        let request = Request::get(objects.target(query)).header(header::ACCEPT, accept);
        self.send(request, Body::empty()).await
    }

    async fn send(&self, request: Builder, body: Body) -> Result<Body, ApiError> {
        let request = request
            .header(header::USER_AGENT, USER_AGENT)
            .body(body)
            .map_err(|source| ApiError::Client { source: Box::new(kube_client::Error::HttpError(source)) })?;
        let response = self.client.send(request).await;
        let response = response.map_err(|source| ApiError::Unreachable { source: Box::new(source) })?;
        let (head, body) = response.into_parts();
        if head.status.is_success() {
            return Ok(body);
        }
        let body = read(body, MAX_LINE).await.unwrap_or_default();
        let mut status: Status = serde_json::from_slice(&body)
            .unwrap_or_else(|_| Status::from_text(String::from_utf8_lossy(&body).into_owned()));
        status.code = head.status.as_u16();
        let retry_after =
            head.headers.get(header::RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
        Err(status.into_error(retry_after))
    }
}

impl Collection {
    fn target(&self, query: &[(&str, &str)]) -> String {
        let path = format!("{}?", self.path);
        let length = path.len();
        form_urlencoded::Serializer::for_suffix(path, length)
            .extend_pairs(self.field_selector.iter().map(|selector| ("fieldSelector", selector)))
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
pub(super) struct Lines(Pin<Box<dyn AsyncBufRead + Send>>);

impl Lines {
    /// Waits for the next event and returns its JSON. Returns `None` if the server ended the watch.
    pub(super) async fn next(&mut self) -> Result<Option<Vec<u8>>, ApiError> {
        loop {
            let mut line = Vec::new();
            self.0
                .as_mut()
                .take(MAX_LINE as u64)
                .read_until(b'\n', &mut line)
                .await
                .map_err(ApiError::closed)?;
            match line.strip_suffix(b"\n") {
                Some(json) if json.trim_ascii().is_empty() => {}
                Some(_) => return Ok(Some(line)),
                None if line.is_empty() => return Ok(None),
                None if line.len() == MAX_LINE => return Err(ApiError::TooLong { limit: MAX_LINE }),
                None => return Err(ApiError::ConnectionClosed { source: None }),
            }
        }
    }
}

async fn read(body: Body, limit: usize) -> Result<Vec<u8>, ApiError> {
    let (mut chunks, mut bytes) = (body.into_data_stream(), Vec::new());
    while let Some(chunk) = chunks.try_next().await.map_err(ApiError::closed)? {
        bytes.extend_from_slice(&chunk);
        if bytes.len() > limit {
            return Err(ApiError::TooLong { limit });
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use futures_util::io::Cursor;

    use super::{
        super::{api_error::ErrorKind, object_list::WatchEvent, pod::Pod},
        *,
    };

    fn lines(text: &str) -> Lines {
        Lines(Box::pin(Cursor::new(text.as_bytes().to_vec())))
    }

    #[tokio::test(flavor = "current_thread")]
    async fn watch_is_read_by_line() {
        let bookmark = r#"{"type":"BOOKMARK","object":{"kind":"Pod","metadata":{"resourceVersion":"7"}}}"#;
        let pod = r#"{"type":"ADDED","object":{"metadata":{"uid":"u","namespace":"n","name":"p"}}}"#;
        let mut two = lines(&format!("{bookmark}\n\n{pod}\n"));
        let next = async |lines: &mut Lines| {
            lines.next().await?.map(|json| WatchEvent::<Pod>::from_json(&json)).transpose()
        };
        assert!(matches!(next(&mut two).await.unwrap(), Some(WatchEvent::Bookmark(_))));
        assert!(matches!(next(&mut two).await.unwrap(), Some(WatchEvent::Added(_))));
        assert!(next(&mut two).await.unwrap().is_none());

        let kind = async |text: &str| next(&mut lines(text)).await.err().unwrap().kind();
        assert_eq!(kind(&pod[..40]).await, ErrorKind::Closed);
        assert_eq!(kind(&format!("{}\n", &pod[..40])).await, ErrorKind::Malformed);
        assert_eq!(kind("{\"type\":\"MOVED\",\"object\":{}}\n").await, ErrorKind::Malformed);
        let endless = "x".repeat(MAX_LINE + 1);
        assert!(matches!(lines(&endless).next().await, Err(ApiError::TooLong { .. })));
    }
}
