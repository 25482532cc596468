//! List and watch of the pods of one node, with retries until it is dropped.
//!
//! While the server is unreachable, the last known pods stay. Pods that the server has not reported are unknown.

use std::{future::pending, time::Duration};

use jiff::Timestamp;
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::{Instant, sleep, timeout_at},
};

use super::{
    api::{Api, PODS},
    api_error::{ApiError, ErrorKind, with_causes},
    backoff::Backoff,
    pod_list::{PodEvent, WatchEvent},
    store::MAX_PODS,
    watch_state::WatchState,
};
use crate::config::Access;

/// A watch that ends sooner than this without an event counts as a failure.
const MIN_LIVENESS: Duration = Duration::from_secs(1);

/// Settings of the pod watch.
#[derive(Clone, Debug)]
pub struct Options {
    /// Name of the node whose pods are watched.
    pub node: String,
    /// Number of pods per page of a list.
    pub page: u32,
    /// Upper bound of the pages of a list. Must suffice for all pods of the largest clusters, because a server may
    /// ignore field selectors.
    pub max_pages: usize,
    /// Duration of a watch, after which the next one continues. Bounds the time for which a silently broken connection
    /// stays unnoticed.
    pub watch: Duration,
    /// Timeout for an answer of the server.
    pub response_timeout: Duration,
    /// Backoff between attempts after an error.
    pub backoff: Backoff,
}

impl Options {
    /// Returns settings that suit clusters of any size.
    pub fn new(node: String) -> Self {
        Self {
            node,
            page: 50,
            max_pages: 10_000,
            watch: Duration::from_mins(2),
            response_timeout: Duration::from_secs(30),
            backoff: Backoff::default(),
        }
    }
}

/// Pod watch that runs in the background. Dropping it ends the watch.
#[derive(Debug)]
pub struct PodWatcher {
    events: mpsc::Receiver<PodEvent>,
    state: watch::Receiver<WatchState>,
    /// The task of the watch, which ends when this is dropped.
    _task: JoinSet<()>,
}

impl PodWatcher {
    /// Starts the watch. Must be called within a tokio runtime.
    ///
    /// The watch retries forever, even if the kubeconfig file does not exist yet.
    pub fn start(access: Access, options: Options) -> Self {
        let (to_events, events) = mpsc::channel(64);
        let (to_state, state) = watch::channel(WatchState::new());
        let reflector = Reflector {
            access,
            options,
            api: None,
            version: "0".to_owned(),
            must_list: true,
            events: to_events,
            state: to_state,
            last_logged: None,
        };
        Self { events, state, _task: JoinSet::from_iter([reflector.run()]) }
    }

    /// Waits for the next event. Cancel safe.
    pub async fn next(&mut self) -> Option<PodEvent> {
        self.events.recv().await
    }

    /// Returns a receiver of the state of the watch.
    pub fn state(&self) -> watch::Receiver<WatchState> {
        self.state.clone()
    }
}

struct Reflector {
    access: Access,
    options: Options,
    api: Option<Api>,
    /// Resource version after all events so far, for the next request: see [`Api::list`].
    version: String,
    /// True if a watch cannot continue from `version`.
    must_list: bool,
    events: mpsc::Sender<PodEvent>,
    state: watch::Sender<WatchState>,
    /// Last logged error, so that an error is logged once and not with every attempt.
    last_logged: Option<String>,
}

impl Reflector {
    async fn run(mut self) {
        loop {
            if let Err(error) = self.list_and_watch().await {
                let delay = self.options.backoff.next_delay(error.retry_after());
                self.on_error(&error, delay);
                sleep(delay).await;
            }
        }
    }

    /// Lists all pods if necessary, then watches them until the server ends the watch.
    async fn list_and_watch(&mut self) -> Result<(), ApiError> {
        let Options { node, watch, response_timeout, .. } = &self.options;
        let (watch, response_timeout) = (*watch, *response_timeout);
        let api = match &self.api {
            Some(api) => api.clone(),
            None => self.api.insert(Api::new(&self.access, node, response_timeout).await?).clone(),
        };
        if self.must_list {
            self.relist(&api).await?;
        }
        let start = Instant::now();
        let mut lines = api.watch(&self.version, watch).await?;
        self.connected();
        let deadline = start + watch + response_timeout;
        let mut is_silent = true;
        loop {
            let event = timeout_at(deadline, lines.next()).await;
            let event = event.map_err(|_| ApiError::Timeout { after: start.elapsed() })?;
            let Some(event) = event? else { break };
            self.apply_event(event).await?;
            is_silent = false;
            self.options.backoff.reset();
        }
        if is_silent && start.elapsed() < MIN_LIVENESS {
            return Err(ApiError::ConnectionClosed { source: None });
        }
        self.options.backoff.reset();
        Ok(())
    }

    async fn relist(&mut self, api: &Api) -> Result<(), ApiError> {
        let Options { node, page, max_pages, .. } = &self.options;
        let (mut pods, mut next, mut pages) = (Vec::new(), None::<String>, 0);
        let version = loop {
            let list = api.list(&self.version, *page, next.as_deref()).await;
            if let Err(ApiError::Expired { .. }) = list {
                self.version.clear();
            }
            let (listed, version, token) = list?.into_parts(node)?;
            pages += 1;
            pods.extend(listed);
            next = token;
            if next.is_none() {
                break version;
            }
            if pods.len() > MAX_PODS || pages >= *max_pages {
                return Err(ApiError::ListTooLong { pages, pods: pods.len() });
            }
        };
        log::debug!("{} pods on this node at resource version {version}", pods.len());
        (self.version, self.must_list) = (version, false);
        self.send(PodEvent::Relist(pods)).await;
        self.state.send_modify(|state| {
            state.relists += 1;
            state.last_sync = Some(Timestamp::now());
        });
        Ok(())
    }

    async fn apply_event(&mut self, event: WatchEvent) -> Result<(), ApiError> {
        let (event, version) = event.into_event(&self.options.node)?;
        let is_of_pod = event.is_some();
        if let Some(event) = event {
            self.send(event).await;
        }
        self.version = version;
        self.state.send_modify(|state| {
            state.events += u64::from(is_of_pod);
            state.last_sync = Some(Timestamp::now());
        });
        Ok(())
    }

    async fn send(&self, event: PodEvent) {
        if self.events.send(event).await.is_err() {
            // The watcher was dropped, which ends this task.
            pending::<()>().await;
        }
    }

    fn connected(&mut self) {
        if self.last_logged.take().is_some() {
            log::info!("pod watch re-established");
        }
        self.state.send_modify(WatchState::connect);
    }

    fn on_error(&mut self, error: &ApiError, delay: Duration) {
        let described = self.api.as_ref().map(|api| api.describe(PODS, error));
        let text = described.unwrap_or_else(|| with_causes(error));
        match error.kind() {
            // Only a complete list contains the missed events.
            ErrorKind::Expired | ErrorKind::Malformed => self.must_list = true,
            // Credentials and addresses may have changed: read them again.
            ErrorKind::Config | ErrorKind::Connect | ErrorKind::Timeout | ErrorKind::Forbidden => {
                self.api = None;
            }
            ErrorKind::Closed | ErrorKind::Throttled | ErrorKind::Server => {}
        }
        let kind = error.kind();
        self.state.send_modify(|state| state.fail(kind, text.clone(), delay));
        let is_expected = matches!(kind, ErrorKind::Expired | ErrorKind::Closed);
        if is_expected || self.last_logged.as_ref() == Some(&text) {
            log::debug!("{text}");
        } else {
            log::warn!("pod watch failed, keeping existing exemptions: {text}");
            self.last_logged = Some(text);
        }
    }
}
