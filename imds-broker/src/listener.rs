//! Listener in the network namespace of a pod.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use imds_broker::{allow::Rule, provider::Provider, request::Request};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, oneshot},
    task::JoinSet,
    time::sleep,
};

use crate::{
    connection,
    control::Control,
    limits::{
        ACCEPT_BACKOFF, EXPLAINED_REQUEST_TIMEOUT, MAX_CONNECTIONS, MAX_EXPLAINED_CONNECTIONS,
        REQUEST_TIMEOUT, RateLimiter,
    },
    reports::Reporter,
    response::Refusal,
};

/// Properties that all connections of a listener share.
#[derive(Debug)]
pub(crate) struct Listener {
    /// Address of the metadata service.
    pub(crate) endpoint: SocketAddr,
    pub(crate) provider: &'static Provider,
    pub(crate) reporter: Reporter,
    rules: Vec<Rule>,
    requests: Mutex<RateLimiter>,
    /// Connections that may still be accepted.
    free_connections: Arc<Semaphore>,
    /// Connections of all listeners that may still be served.
    all_free_connections: Arc<Semaphore>,
}

impl Listener {
    pub(crate) fn new(
        id: u32,
        endpoint: SocketAddr,
        provider: &'static Provider,
        rules: Vec<Rule>,
        control: &Arc<Control>,
        all_free_connections: Arc<Semaphore>,
    ) -> Self {
        let limit = if rules.is_empty() { MAX_EXPLAINED_CONNECTIONS } else { MAX_CONNECTIONS };
        Self {
            endpoint,
            provider,
            reporter: Reporter::new(id, Arc::clone(control)),
            rules,
            requests: Mutex::new(RateLimiter::for_requests(Instant::now())),
            free_connections: Arc::new(Semaphore::new(limit)),
            all_free_connections,
        }
    }

    /// Reports whether the listener forwards no request, and explains the denial instead.
    pub(crate) fn explains(&self) -> bool {
        self.rules.is_empty()
    }

    /// Time in which a client must send the first byte on a new connection, and then the head and the body of a request.
    pub(crate) fn request_timeout(&self) -> Duration {
        if self.explains() { EXPLAINED_REQUEST_TIMEOUT } else { REQUEST_TIMEOUT }
    }

    /// Decides whether a request may be forwarded.
    pub(crate) fn check(&self, request: &Request) -> Result<(), Refusal> {
        let is_within_rate =
            self.requests.lock().unwrap_or_else(PoisonError::into_inner).allow(Instant::now()).is_ok();
        if !is_within_rate {
            return Err(Refusal::TooManyRequests);
        }
        let (method, path) = (request.method().as_str(), request.path());
        let mut allowing =
            self.rules.iter().filter(|rule| rule.allows(method, path, request.query())).peekable();
        if allowing.peek().is_none() {
            return Err(Refusal::not_allowed(method, path));
        }
        if request.content_length() > 0 && allowing.all(Rule::restricts_parameters) {
            return Err(Refusal::UncheckedBody);
        }
        match self.provider.unknown_parameter(request.query()) {
            Some(parameter) => Err(Refusal::UnknownParameter(parameter.to_owned())),
            None => Ok(()),
        }
    }

    /// Reports whether an idle connection would make a new one wait.
    pub(crate) fn is_full(&self) -> bool {
        self.free_connections.available_permits() == 0 || self.all_free_connections.available_permits() == 0
    }
}

/// Accepts connections until `closed` resolves. Then resets all connections, which frees the network namespace, and returns.
pub(crate) async fn serve(socket: TcpListener, listener: Arc<Listener>, closed: oneshot::Receiver<()>) {
    let mut connections = JoinSet::new();
    tokio::select! {
        _ = closed => {}
        () = accept_all(&socket, &listener, &mut connections) => {}
    }
    drop(socket);
    connections.shutdown().await;
}

/// Accepts connections. Returns if the socket no longer listens: a privileged process in the pod can close it (`SOCK_DESTROY`).
async fn accept_all(socket: &TcpListener, listener: &Arc<Listener>, connections: &mut JoinSet<()>) {
    let mut limiter = RateLimiter::for_connections(Instant::now());
    loop {
        let Ok(permit) = Arc::clone(&listener.free_connections).acquire_owned().await else { return };
        while let Err(wait) = limiter.allow(Instant::now()) {
            // The timer has a resolution of a millisecond.
            sleep(wait.max(Duration::from_millis(1))).await;
        }
        match socket.accept().await {
            Ok((stream, _)) => {
                // One accepted connection of each listener waits, so that descriptors have a bound.
                let Ok(of_all) = Arc::clone(&listener.all_free_connections).acquire_owned().await else {
                    return;
                };
                let listener = Arc::clone(listener);
                connections.spawn(async move {
                    let _permits = (permit, of_all);
                    connection::serve(stream, &listener).await;
                });
            }
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return,
            // The client has gone, or no descriptor is free.
            Err(_) => sleep(ACCEPT_BACKOFF).await,
        }
        while connections.try_join_next().is_some() {}
    }
}
