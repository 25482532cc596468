//! Requests to the metadata service.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::{
    body::{Body as _, Incoming},
    client::conn::http1,
};
use hyper_util::rt::TokioIo;
use imds_broker::{provider::Provider, request::Request as PodRequest};
use thiserror::Error;
use tokio::{net::TcpStream, task::JoinSet, time::timeout};

/// Longest body of a response.
pub(crate) const MAX_RESPONSE: u64 = 1024 * 1024;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Time limit of a request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Time limit of a request that waits for an event: `wait_for_change` of GCP, and the first request for the scheduled events of
/// Azure, which takes up to two minutes.
const LONG_REQUEST_TIMEOUT: Duration = Duration::from_secs(130);

/// Longest head of a response, and size of the buffer of a connection.
const MAX_BUFFER: usize = 16 * 1024;

/// Reason why a request has failed.
#[derive(Debug, Error)]
pub(crate) enum Failure {
    #[error("failed to connect to the metadata service: {0}")]
    Connect(io::Error),
    #[error("the exchange with the metadata service did not end in time")]
    Timeout,
    #[error("failed to exchange messages with the metadata service: {0}")]
    Exchange(#[from] hyper::Error),
    #[error("failed to build the request: {0}")]
    Request(#[from] http::Error),
    #[error("the response of the metadata service changes the protocol")]
    Upgrade,
    #[error("the response of the metadata service is longer than 1 MiB")]
    TooLong,
    #[error("failed to write to the pod: {0}")]
    Pod(#[from] io::Error),
    #[error("the pod closed the connection")]
    PodClosed,
}

impl Failure {
    /// Returns the status of the response that the pod gets instead.
    pub(crate) fn status(&self) -> StatusCode {
        match self {
            Self::Timeout => StatusCode::GATEWAY_TIMEOUT,
            Self::Connect(_)
            | Self::Exchange(_)
            | Self::Request(_)
            | Self::Upgrade
            | Self::TooLong
            | Self::Pod(_)
            | Self::PodClosed => StatusCode::BAD_GATEWAY,
        }
    }
}

/// Response of the metadata service, and the connection from which its body is read.
#[derive(Debug)]
pub(crate) struct Exchange {
    pub(crate) response: Response<Incoming>,
    /// Aborted when the exchange is dropped.
    pub(crate) connection: JoinSet<()>,
}

/// Returns the time limit of a request.
pub(crate) fn time_limit(provider: &Provider, request: &PodRequest) -> Duration {
    let is_long = match provider.name {
        "azure" => request.path().starts_with("/metadata/scheduledevents"),
        "gcp" => request.query().is_some_and(|query| query.contains("wait_for_change=")),
        _ => false,
    };
    if is_long { LONG_REQUEST_TIMEOUT } else { REQUEST_TIMEOUT }
}

/// Sends a request and waits for the head of the response. Each request has a connection of its own, so that requests of pods share
/// nothing.
pub(crate) async fn send(
    endpoint: SocketAddr,
    provider: &Provider,
    request: &PodRequest,
    body: Bytes,
) -> Result<Exchange, Failure> {
    let request = rebuild(endpoint, provider, request, body)?;
    let stream = match timeout(CONNECT_TIMEOUT, TcpStream::connect(endpoint)).await {
        Ok(connected) => connected.map_err(Failure::Connect)?,
        Err(_) => return Err(Failure::Timeout),
    };
    stream.set_nodelay(true).map_err(Failure::Connect)?;
    // A connection that the node closes would otherwise keep its port for a minute, and the node's own requests need ports.
    stream.set_zero_linger().map_err(Failure::Connect)?;
    let (mut sender, connection) =
        http1::Builder::new().max_buf_size(MAX_BUFFER).handshake(TokioIo::new(stream)).await?;
    let mut task = JoinSet::new();
    task.spawn(async {
        // The sender and the body report the error.
        let _result = connection.await;
    });
    let response = sender.send_request(request).await?;
    if response.status().is_informational() {
        return Err(Failure::Upgrade);
    }
    if response.body().size_hint().lower() > MAX_RESPONSE {
        return Err(Failure::TooLong);
    }
    Ok(Exchange { response, connection: task })
}

/// Builds the request for the metadata service from the parts of a canonical request.
fn rebuild(
    endpoint: SocketAddr,
    provider: &Provider,
    request: &PodRequest,
    body: Bytes,
) -> Result<Request<Full<Bytes>>, http::Error> {
    let mut rebuilt = Request::builder()
        .method(request.method())
        .uri(request.target())
        .header(header::HOST, host(endpoint));
    for (name, value) in request.headers().filter(|(name, value)| provider.forwards_header(name, value)) {
        rebuilt = rebuilt.header(name, value);
    }
    if [Method::POST, Method::PUT].contains(request.method()) {
        rebuilt = rebuilt.header(header::CONTENT_LENGTH, body.len());
    }
    rebuilt.body(Full::new(body))
}

fn host(endpoint: SocketAddr) -> String {
    let address = match endpoint.ip() {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => format!("[{address}]"),
    };
    if endpoint.port() == 80 { address } else { format!("{address}:{}", endpoint.port()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(head: &str) -> PodRequest {
        PodRequest::parse(head.as_bytes()).unwrap()
    }

    #[test]
    fn requests_are_rebuilt() {
        let pod_request = parse(
            "PUT /latest/api/token HTTP/1.1\r\nHost: evil\r\nX-aws-ec2-metadata-token-ttl-seconds: 60\r\nCookie: a\r\n\
             Metadata: true\r\nUser-Agent: sdk\r\nConnection: keep-alive\r\nContent-Length: 1\r\nVia: b\r\n\r\n",
        );
        let endpoint = "[fd00:ec2::254]:80".parse().unwrap();
        let request =
            rebuild(endpoint, Provider::named("aws"), &pod_request, Bytes::from_static(b"x")).unwrap();
        assert_eq!((request.method(), request.uri().path()), (&Method::PUT, "/latest/api/token"));
        let headers: Vec<_> =
            request.headers().iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect();
        assert_eq!(
            headers,
            [
                ("host", "[fd00:ec2::254]"),
                ("x-aws-ec2-metadata-token-ttl-seconds", "60"),
                ("user-agent", "sdk"),
                ("content-length", "1"),
            ]
        );
    }

    #[test]
    fn hosts_have_no_scope() {
        let host = |endpoint: &str| host(endpoint.parse().unwrap());
        assert_eq!(host("169.254.169.254:80"), "169.254.169.254");
        assert_eq!(host("[fe80::a9fe:a9fe%2]:80"), "[fe80::a9fe:a9fe]");
        assert_eq!(host("127.0.0.1:8080"), "127.0.0.1:8080");
    }

    #[test]
    fn requests_that_wait_have_more_time() {
        let limit = |provider, target| {
            let request = parse(&format!("GET {target} HTTP/1.1\r\nHost: a\r\n\r\n"));
            time_limit(Provider::named(provider), &request)
        };
        assert_eq!(limit("azure", "/metadata/instance?api-version=1"), REQUEST_TIMEOUT);
        assert_eq!(limit("azure", "/metadata/scheduledevents?api-version=1"), LONG_REQUEST_TIMEOUT);
        assert_eq!(
            limit("gcp", "/computeMetadata/v1/instance/tags?wait_for_change=true"),
            LONG_REQUEST_TIMEOUT
        );
        assert_eq!(limit("aws", "/latest/meta-data/events"), REQUEST_TIMEOUT);
    }
}
