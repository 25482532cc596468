//! Connection of a pod, with one request at a time.

use std::{io, time::Duration};

use bytes::Bytes;
use http::{Method, StatusCode};
use http_body_util::BodyExt as _;
use hyper::body::Body as _;
use imds_broker::{
    protocol::Outcome,
    provider::{AWS, AWS_TOKEN_PATH},
    request::{HeadScanner, MAX_HEAD, Malformed, Request, describe_malformed},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{Instant, timeout, timeout_at},
};

use crate::{
    explanation,
    limits::{IDLE_TIMEOUT, LINGER_TIMEOUT},
    listener::Listener,
    reports::Report,
    response::{self, Framing, Refusal},
    upstream::{self, Exchange, Failure, MAX_RESPONSE},
};

/// Size of the buffer for the start of a request. Most requests fit.
const READ_SIZE: usize = 1024;
/// Bytes that are discarded after the last response.
const MAX_DISCARDED: u64 = 64 * 1024;

/// Serves requests until the connection ends.
pub(crate) async fn serve(stream: TcpStream, listener: &Listener) {
    let mut connection =
        Connection { stream: Stream { socket: stream, is_closed: false }, listener, received: Vec::new() };
    // After an error, the pod has closed the connection or received a part of a response: both cases end with a reset.
    if connection.run().await.is_ok() {
        connection.stream.close().await;
    }
}

struct Connection<'l> {
    stream: Stream,
    listener: &'l Listener,
    /// Bytes of the current request.
    received: Vec<u8>,
}

type Received = Result<(Request, Bytes), Refusal>;

impl Connection<'_> {
    async fn run(&mut self) -> Result<(), Failure> {
        self.stream.socket.set_nodelay(true)?;
        let mut wait = self.listener.request_timeout();
        while let Some(received) = self.receive(wait).await? {
            if self.listener.explains() {
                self.explain(received.as_ref().ok().map(|(request, _)| request)).await?;
                // The limit for connections is one for requests, too.
                break;
            }
            let keeps_alive = match received {
                Ok((request, body)) => self.respond(&request, body).await?,
                Err(refusal) => {
                    let (method, path) = describe_malformed(&self.received);
                    self.refuse(method, path, None, &refusal, false).await?;
                    false
                }
            };
            if !keeps_alive {
                break;
            }
            // An idle connection needs no buffer.
            self.received = Vec::new();
            wait = IDLE_TIMEOUT;
        }
        Ok(())
    }

    /// Waits for a request. Returns `None` if the connection ends before.
    async fn receive(&mut self, wait: Duration) -> io::Result<Option<Received>> {
        let Ok(length) = timeout(wait, self.read(MAX_HEAD)).await else { return Ok(None) };
        if length? == 0 {
            return Ok(None);
        }
        match timeout(self.listener.request_timeout(), self.receive_rest()).await {
            Ok(received) => received,
            Err(_) => Ok(Some(Err(Refusal::Incomplete))),
        }
    }

    async fn receive_rest(&mut self) -> io::Result<Option<Received>> {
        let mut scanner = HeadScanner::default();
        let head_length = loop {
            match scanner.find_end(&self.received) {
                Ok(Some(length)) => break length,
                Ok(None) if self.read(MAX_HEAD + 1).await? > 0 => {}
                Ok(None) => return Ok(None),
                Err(error) => return Ok(Some(Err(error.into()))),
            }
        };
        let request = match Request::parse(&self.received[..head_length]) {
            Ok(request) => request,
            Err(error) => return Ok(Some(Err(error.into()))),
        };
        let length = head_length + request.content_length();
        while self.received.len() < length {
            if self.read(length).await? == 0 {
                return Ok(None);
            }
        }
        if self.received.len() > length {
            return Ok(Some(Err(Malformed::Pipelined.into())));
        }
        let body = Bytes::copy_from_slice(&self.received[head_length..]);
        Ok(Some(Ok((request, body))))
    }

    /// Reads bytes, but not more than `limit` in total. Returns 0 at the end of the stream.
    async fn read(&mut self, limit: usize) -> io::Result<usize> {
        self.received.reserve(READ_SIZE);
        let missing = limit.saturating_sub(self.received.len());
        (&mut self.stream.socket).take(missing as u64).read_buf(&mut self.received).await
    }

    /// Responds to a request. Returns whether another one may follow.
    async fn respond(&mut self, request: &Request, body: Bytes) -> Result<bool, Failure> {
        let keeps_alive = request.keeps_alive() && !self.listener.is_full();
        let (method, path) = (request.method().to_string(), request.path().to_owned());
        let imds_version = self.imds_version(request);
        if let Err(refusal) = self.listener.check(request) {
            let keeps_alive = keeps_alive && refusal.keeps_alive();
            self.refuse(method, path, imds_version, &refusal, keeps_alive).await?;
            return Ok(keeps_alive);
        }
        let deadline = Instant::now() + upstream::time_limit(self.listener.provider, request);
        let is_head = *request.method() == Method::HEAD;
        let sent = self.send(request, body, deadline).await;
        let is_started = sent.is_ok();
        let (status, result) = match sent {
            Ok(exchange) => {
                let status = exchange.response.status();
                let relayed = timeout_at(deadline, self.relay(exchange, is_head, keeps_alive)).await;
                (status, relayed.unwrap_or(Err(Failure::Timeout)))
            }
            Err(failure) => (failure.status(), Err(failure)),
        };
        let (outcome, reason) = match &result {
            Ok(()) => (Outcome::Allowed, String::new()),
            Err(failure) => (Outcome::Failed, failure.to_string()),
        };
        self.listener.reporter.send(Report {
            method,
            path,
            imds_version,
            outcome,
            status: status.as_u16(),
            reason,
        });
        match result {
            Ok(()) => Ok(keeps_alive),
            // A part of the response must not look like all of it.
            Err(failure) if is_started => Err(failure),
            Err(failure) => {
                let provider = self.listener.provider;
                let error = response::error(provider, status, &failure.to_string(), is_head, false);
                self.stream.write(&error).await?;
                Ok(false)
            }
        }
    }

    /// Sends a request to the metadata service, as long as the pod waits for the response.
    async fn send(&self, request: &Request, body: Bytes, deadline: Instant) -> Result<Exchange, Failure> {
        let (endpoint, provider) = (self.listener.endpoint, self.listener.provider);
        tokio::select! {
            sent = timeout_at(deadline, upstream::send(endpoint, provider, request, body)) => {
                sent.unwrap_or(Err(Failure::Timeout))
            }
            () = self.stream.closed() => Err(Failure::PodClosed),
        }
    }

    /// Writes the response of the metadata service to the pod while it arrives.
    async fn relay(&mut self, exchange: Exchange, is_head: bool, keeps_alive: bool) -> Result<(), Failure> {
        let Exchange { response, connection: _connection } = exchange;
        let (parts, mut body) = response.into_parts();
        let framing = Framing::new(parts.status, is_head, body.size_hint().exact());
        let mut output = response::forwarded_head(&parts, framing, keeps_alive);
        let mut length = 0;
        while framing != Framing::Empty
            && let Some(frame) = body.frame().await
        {
            // Trailers are dropped.
            let Ok(data) = frame?.into_data() else { continue };
            length += data.len() as u64;
            if length > MAX_RESPONSE {
                return Err(Failure::TooLong);
            }
            framing.write(&mut output, &data);
            self.stream.write(&output).await?;
            output.clear();
        }
        framing.finish(&mut output);
        self.stream.write(&output).await?;
        Ok(())
    }

    async fn refuse(
        &mut self,
        method: String,
        path: String,
        imds_version: Option<u8>,
        refusal: &Refusal,
        keeps_alive: bool,
    ) -> io::Result<()> {
        let (status, reason, is_head) = (refusal.status(), refusal.to_string(), method == "HEAD");
        let response = response::error(self.listener.provider, status, &reason, is_head, keeps_alive);
        let status = status.as_u16();
        let outcome = Outcome::Refused;
        self.listener.reporter.send(Report { method, path, imds_version, outcome, status, reason });
        self.stream.write(&response).await
    }

    /// Answers a request, or a malformed one without `request`, with the reason why the pod is denied.
    async fn explain(&mut self, request: Option<&Request>) -> io::Result<()> {
        let (method, path) = match request {
            Some(request) => (request.method().to_string(), request.path().to_owned()),
            None => describe_malformed(&self.received),
        };
        let imds_version = request.and_then(|request| self.imds_version(request));
        let reason = explanation::reason(&method, &path);
        let response = explanation::response(self.listener.provider, &path, &reason, method == "HEAD");
        let (outcome, status) = (Outcome::Refused, StatusCode::FORBIDDEN.as_u16());
        self.listener.reporter.send(Report { method, path, imds_version, outcome, status, reason });
        self.stream.write(&response).await
    }

    fn imds_version(&self, request: &Request) -> Option<u8> {
        let has_token = request.header("x-aws-ec2-metadata-token").is_some();
        let is_version_2 = has_token || request.path() == AWS_TOKEN_PATH;
        (self.listener.provider.name == AWS).then_some(if is_version_2 { 2 } else { 1 })
    }
}

/// Socket that is reset on drop, unless it was closed. A reset frees the socket, and with it the network namespace, at once. A closed
/// socket would exist until the pod has acknowledged all data.
struct Stream {
    socket: TcpStream,
    is_closed: bool,
}

impl Stream {
    async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match timeout(IDLE_TIMEOUT, self.socket.write_all(bytes)).await {
            Ok(written) => written,
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }

    /// Waits until the pod closes the connection. A pod that sends further bytes is not noticed, because they hide the end.
    async fn closed(&self) {
        match self.socket.peek(&mut [0]).await {
            Ok(0) | Err(_) => {}
            Ok(_) => std::future::pending().await,
        }
    }

    /// Closes the connection after the last response. A socket with unread bytes would be reset, which discards the response on its
    /// way to the pod.
    async fn close(&mut self) {
        if self.socket.shutdown().await.is_err() {
            return;
        }
        let discard = async {
            let mut rest = (&mut self.socket).take(MAX_DISCARDED);
            tokio::io::copy(&mut rest, &mut tokio::io::sink()).await
        };
        // After the timeout the kernel goes on to deliver the response.
        let _result = timeout(LINGER_TIMEOUT, discard).await;
        self.is_closed = true;
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if !self.is_closed {
            // If it fails, the socket is closed instead.
            let _ok = self.socket.set_zero_linger();
        }
    }
}
