//! HTTP server for `/metrics`, `/healthz` and `/readyz`.
//!
//! The size, duration and number of requests are limited.

use std::{
    cell::Cell,
    convert::Infallible,
    fs,
    future::{self, poll_fn},
    io,
    os::unix::fs::{FileTypeExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    pin::Pin,
    rc::Rc,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header::{ACCEPT, ALLOW, CONTENT_TYPE, HeaderMap, HeaderValue, VARY},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    time::{Instant, sleep_until, timeout},
};

use super::{EventStats, Progress};
use crate::{
    config::Listen,
    datapath::{maps::denial_records::Denials, object, pin::dir::PinDir},
    escape::escape_lines,
    node::netlink::Netlink,
    telemetry::{
        metrics::{self, Denied, Format, Snapshot},
        status,
    },
};

/// Maximum number of concurrent connections. Beyond it, a new connection replaces an old one.
const MAX_CONNECTIONS: usize = 16;
/// Time for which a connection without a complete request header can't be replaced.
const HEADER_TIMEOUT: Duration = Duration::from_millis(20);
/// Time for which a connection with a request can't be replaced.
const MIN_CONNECTION_TIME: Duration = Duration::from_secs(1);
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// Limit for a whole connection, request and response.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(15);
/// Maximum size of a request header in bytes, the minimum that hyper accepts.
const MAX_REQUEST_LEN: usize = 8192;
/// Pause after accept(2) failed, as it does without free descriptors.
const PAUSE: Duration = Duration::from_secs(1);

struct Connection {
    work: Pin<Box<dyn Future<Output = ()>>>,
    since: Instant,
    has_request: Rc<Cell<bool>>,
}

pub(super) struct Server {
    configured: Vec<Listen>,
    listening: Vec<Socket>,
    /// Addresses whose last failure is already logged.
    failed: Vec<Listen>,
    connections: Vec<Connection>,
    paused_until: Option<Instant>,
    state: Rc<AppState>,
}

struct AppState {
    pins: PinDir,
    netlink: Netlink,
    progress: Arc<Mutex<Progress>>,
    events: Rc<EventStats>,
    /// Time without progress after which the agent is not healthy.
    liveness_timeout: Duration,
}

impl Server {
    /// Creates a server that does not listen yet, for the agent of `pins`, which reports `progress` at least once per `period`.
    pub(super) fn new(
        pins: PinDir,
        netlink: Netlink,
        progress: Arc<Mutex<Progress>>,
        events: Rc<EventStats>,
        period: Duration,
    ) -> Self {
        let liveness_timeout = period * 3 + Duration::from_secs(10);
        Self {
            configured: Vec::new(),
            listening: Vec::new(),
            failed: Vec::new(),
            connections: Vec::new(),
            paused_until: None,
            state: Rc::new(AppState { pins, netlink, progress, events, liveness_timeout }),
        }
    }

    pub(super) fn listen(&mut self, addresses: &[Listen]) {
        addresses.clone_into(&mut self.configured);
        self.listening.retain(|socket| addresses.contains(&socket.address));
        self.failed.retain(|address| addresses.contains(address));
        self.retry();
    }

    pub(super) fn retry(&mut self) {
        for address in &self.configured {
            if self.listening.iter().any(|socket| socket.address == *address) {
                continue;
            }
            match Socket::bind(address) {
                Ok(socket) => {
                    log::info!("serving metrics and health at {address}");
                    self.listening.push(socket);
                    self.failed.retain(|failed| failed != address);
                }
                Err(error) if !self.failed.contains(address) => {
                    log::error!(
                        "failed to serve metrics and health at {address} (metrics.listen), retrying at each resync: {error}"
                    );
                    self.failed.push(address.clone());
                }
                Err(_) => {}
            }
        }
    }

    /// Serves connections. Cancel safe: dropping the future loses no connection.
    pub(super) async fn run_until_idle(&mut self) -> Infallible {
        loop {
            let accept_paused_until = self.accept_paused_until();
            tokio::select! {
                // Served first, so that a new connection does not replace one whose request has arrived.
                biased;
                () = serve_all(&mut self.connections) => {}
                stream = accept(&self.listening), if accept_paused_until.is_none() => match stream {
                    Ok(stream) => self.accept_connection(stream),
                    Err(error) => {
                        log::debug!("failed to accept a connection: {error}");
                        self.paused_until = Some(Instant::now() + PAUSE);
                    }
                },
                () = pause(accept_paused_until) => {}
            }
        }
    }

    /// Returns the time until which no connection is accepted; `None` if one can be accepted now.
    fn accept_paused_until(&self) -> Option<Instant> {
        let is_full = self.connections.len() >= MAX_CONNECTIONS;
        let first_evictable = self.connections.iter().map(Connection::evictable_at).min().filter(|_| is_full);
        [first_evictable, self.paused_until]
            .into_iter()
            .flatten()
            .max()
            .filter(|&until| until > Instant::now())
    }

    fn accept_connection(&mut self, stream: Box<dyn Stream>) {
        let by_time = |(_, connection): &(usize, &Connection)| connection.evictable_at();
        if self.connections.len() >= MAX_CONNECTIONS
            && let Some((first_evictable, _)) = self.connections.iter().enumerate().min_by_key(by_time)
        {
            drop(self.connections.swap_remove(first_evictable));
        }
        self.connections.push(Connection::new(stream, Rc::clone(&self.state)));
    }
}

impl Connection {
    fn new(stream: Box<dyn Stream>, state: Rc<AppState>) -> Self {
        let (since, has_request) = (Instant::now(), Rc::default());
        Self { work: Box::pin(serve(stream, state, Rc::clone(&has_request))), since, has_request }
    }

    fn evictable_at(&self) -> Instant {
        self.since + if self.has_request.get() { MIN_CONNECTION_TIME } else { HEADER_TIMEOUT }
    }
}

/// Serves all connections until at least one has ended.
async fn serve_all(connections: &mut Vec<Connection>) {
    poll_fn(|context| {
        let before = connections.len();
        connections.retain_mut(|connection| connection.work.as_mut().poll(context).is_pending());
        if connections.len() < before { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}

async fn pause(until: Option<Instant>) {
    match until {
        Some(until) => sleep_until(until).await,
        None => future::pending().await,
    }
}

async fn accept(sockets: &[Socket]) -> io::Result<Box<dyn Stream>> {
    poll_fn(|context| {
        let ready = sockets.iter().map(|socket| socket.poll_accept(context)).find(Poll::is_ready);
        ready.unwrap_or(Poll::Pending)
    })
    .await
}

struct Socket {
    address: Listen,
    listener: Listener,
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

trait Stream: AsyncRead + AsyncWrite + Unpin {}

impl<S: AsyncRead + AsyncWrite + Unpin> Stream for S {}

impl Socket {
    fn bind(address: &Listen) -> io::Result<Self> {
        let listener = match address {
            Listen::Tcp(address) => {
                let listener = std::net::TcpListener::bind(address)?;
                listener.set_nonblocking(true)?;
                Listener::Tcp(TcpListener::from_std(listener)?)
            }
            Listen::Unix(path) => Listener::Unix(bind_unix(path)?),
        };
        Ok(Self { address: address.clone(), listener })
    }

    fn poll_accept(&self, context: &mut Context<'_>) -> Poll<io::Result<Box<dyn Stream>>> {
        match &self.listener {
            Listener::Tcp(listener) => {
                listener.poll_accept(context).map_ok(|(stream, _)| Box::new(stream) as _)
            }
            Listener::Unix(listener) => {
                listener.poll_accept(context).map_ok(|(stream, _)| Box::new(stream) as _)
            }
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if let Listen::Unix(path) = &self.address
            && let Err(error) = fs::remove_file(path)
        {
            log::debug!("failed to remove {}: {error}", path.display());
        }
    }
}

/// Binds a Unix socket. Replaces a socket file without a listener, as a killed agent leaves it.
fn bind_unix(path: &PathBuf) -> io::Result<UnixListener> {
    if is_stale_socket(path) {
        fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o660))?;
    Ok(listener)
}

fn is_stale_socket(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket())
        && std::os::unix::net::UnixStream::connect(path)
            .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

/// Serves one request, and sets `has_request` once its header has arrived.
async fn serve(stream: Box<dyn Stream>, state: Rc<AppState>, has_request: Rc<Cell<bool>>) {
    let answer = service_fn(|request| {
        has_request.set(true);
        let state = Rc::clone(&state);
        async move { Ok::<_, Infallible>(answer(&request, &state).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(REQUEST_TIMEOUT)
        .max_buf_size(MAX_REQUEST_LEN)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), answer);
    match timeout(CONNECTION_TIMEOUT, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => log::debug!("failed to serve a request for metrics or health: {error}"),
        Err(_) => log::debug!("closed a connection for metrics or health after {CONNECTION_TIMEOUT:?}"),
    }
}

async fn answer(request: &Request<Incoming>, state: &AppState) -> Response<Full<Bytes>> {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "GET or HEAD");
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    let response = match request.uri().path() {
        "/healthz" => Ok(state.health()),
        "/readyz" => state.readiness().await,
        "/metrics" => state.metrics(format(request.headers())).await,
        _ => Ok(text(StatusCode::NOT_FOUND, "not found: see /metrics, /healthz and /readyz")),
    };
    response.unwrap_or_else(|error| text(StatusCode::INTERNAL_SERVER_ERROR, &format!("{error:#}")))
}

impl AppState {
    /// Answers `/healthz`: 200 while the reconciler makes progress.
    fn health(&self) -> Response<Full<Bytes>> {
        let idle = self.progress().reported.elapsed();
        if idle <= self.liveness_timeout {
            return text(StatusCode::OK, "ok");
        }
        text(StatusCode::SERVICE_UNAVAILABLE, &format!("no progress for {} s", idle.as_secs()))
    }

    /// Answers `/readyz`: 200 if every interface, cgroup and hook is enforced.
    async fn readiness(&self) -> anyhow::Result<Response<Full<Bytes>>> {
        Ok(match &status::gather_enforcement(&self.pins, &self.netlink).await?.not_enforced()[..] {
            [] => text(StatusCode::OK, "ok"),
            not_enforced => text(StatusCode::SERVICE_UNAVAILABLE, &not_enforced.join("\n")),
        })
    }

    async fn metrics(&self, format: Format) -> anyhow::Result<Response<Full<Bytes>>> {
        let report = status::gather(&self.pins, &self.netlink).await?;
        let denials = self.denials()?;
        let stats = self.progress().stats.clone();
        let collected = self.events.collected.get();
        let exemptions_hash = metrics::exemptions_hash(&self.pins);
        let sinks = self.events.sinks.queues();
        let snapshot = Snapshot { report, denials, stats, collected, exemptions_hash, sinks };
        let metrics = metrics::encode(&snapshot, &self.pins, format);
        let mut response = respond(StatusCode::OK, format.content_type(), metrics);
        response.headers_mut().insert(VARY, HeaderValue::from_static("accept"));
        Ok(response)
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn denials(&self) -> anyhow::Result<Denied> {
        let mut totals = self.events.totals.borrow_mut();
        // Another process adds to the records while it collects.
        if self.events.collected.get().is_none() && object::is_loaded(&self.pins) {
            totals.raise_to(&metrics::sum(Denials::open(&self.pins)?.iter())?);
        }
        Ok(totals.denied().clone())
    }
}

/// Returns the format that the client prefers. A header can be given in several lines.
fn format(headers: &HeaderMap) -> Format {
    let lines: Vec<_> = headers.get_all(ACCEPT).iter().filter_map(|line| line.to_str().ok()).collect();
    Format::from_accept(&lines.join(","))
}

fn text(status: StatusCode, line: &str) -> Response<Full<Bytes>> {
    respond(status, "text/plain; charset=utf-8", format!("{}\n", escape_lines(line)))
}

fn respond(status: StatusCode, content_type: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}
