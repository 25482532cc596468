//! List and watch of API objects, with retries until it is dropped.
//!
//! While the server is unreachable, the last known objects stay. Objects that the server has not reported are unknown.

use std::time::Duration;

use jiff::Timestamp;
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::{Instant, sleep, timeout_at},
};

use super::{
    api::Api,
    api_error::{ApiError, ErrorKind},
    backoff::Backoff,
    object_list::{AddedPage, Decode, Decoder, ObjectEvent},
    pod::Pod,
    resource::{Collection, Resource},
    watch_state::WatchState,
};
use crate::{causes::with_causes, config::Access};

/// A watch that ends sooner than this without an event counts as a failure.
const MIN_LIVENESS: Duration = Duration::from_secs(1);

/// Settings of a watch.
#[derive(Clone, Debug)]
pub struct Options {
    /// Number of objects per page of a list.
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

impl Default for Options {
    /// Returns settings that suit clusters of any size.
    fn default() -> Self {
        Self {
            page: 50,
            max_pages: 10_000,
            watch: Duration::from_mins(2),
            response_timeout: Duration::from_secs(30),
            backoff: Backoff::default(),
        }
    }
}

/// Watch of objects that runs in the background. Dropping it ends the watch.
#[derive(Debug)]
pub struct Watcher<T> {
    events: mpsc::Receiver<ObjectEvent<T>>,
    state: watch::Receiver<WatchState>,
    /// The task of the watch, which ends when this is dropped.
    _task: JoinSet<()>,
}

/// Watch of the pods of a node.
pub type PodWatcher = Watcher<Pod>;

impl<T: Resource> Watcher<T> {
    /// Starts the watch of the objects within `scope`. Must be called within a tokio runtime.
    ///
    /// The watch retries forever, even if the kubeconfig file does not exist yet.
    pub fn start(access: Access, scope: T::Scope, options: Options) -> Self {
        let (to_events, events) = mpsc::channel(64);
        let (to_state, state) = watch::channel(WatchState::new());
        let reflector = Reflector {
            access,
            objects: Collection::new::<T>(&scope),
            decoder: Box::new(Decoder::new(scope, to_events)),
            options,
            api: None,
            version: "0".to_owned(),
            must_list: true,
            state: to_state,
            last_logged: None,
        };
        Self { events, state, _task: JoinSet::from_iter([reflector.run()]) }
    }

    /// Waits for the next event. Cancel safe.
    pub async fn next(&mut self) -> Option<ObjectEvent<T>> {
        self.events.recv().await
    }

    /// Returns a receiver of the state of the watch.
    pub fn state(&self) -> watch::Receiver<WatchState> {
        self.state.clone()
    }
}

struct Reflector {
    access: Access,
    objects: Collection,
    decoder: Box<dyn Decode>,
    options: Options,
    api: Option<Api>,
    /// Resource version after all events so far, for the next request: see [`Api::list`].
    version: String,
    /// True if a watch cannot continue from `version`.
    must_list: bool,
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

    /// Lists all objects if necessary, then watches them until the server ends the watch.
    async fn list_and_watch(&mut self) -> Result<(), ApiError> {
        let Options { watch, response_timeout, .. } = self.options;
        let api = match &self.api {
            Some(api) => api.clone(),
            None => self.api.insert(Api::new(&self.access, response_timeout).await?).clone(),
        };
        if self.must_list {
            self.relist(&api).await?;
        }
        let start = Instant::now();
        let mut lines = api.watch(&self.objects, &self.version, watch).await?;
        self.connected();
        let deadline = start + watch + response_timeout;
        let mut is_silent = true;
        loop {
            let line = timeout_at(deadline, lines.next()).await;
            let line = line.map_err(|_| ApiError::Timeout { after: start.elapsed() })?;
            let Some(line) = line? else { break };
            self.apply_line(&line).await?;
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
        let Options { page, max_pages, .. } = self.options;
        let (mut next, mut pages) = (None::<String>, 0);
        self.decoder.begin_list();
        let (objects, version) = loop {
            let list = api.list(&self.objects, &self.version, page, next.as_deref()).await;
            match &list {
                // Only a consistent read has pages.
                Err(ApiError::TooLong { .. }) if self.version.is_empty() => {
                    self.options.page = (page / 2).max(1);
                }
                Err(ApiError::TooLong { .. } | ApiError::Expired { .. }) => self.version.clear(),
                _ => {}
            }
            let AddedPage { objects, version, next: token } = self.decoder.add_page(&list?)?;
            pages += 1;
            next = token;
            if next.is_none() {
                break (objects, version);
            }
            if objects > self.objects.max || pages >= max_pages {
                let Collection { kind, all, .. } = self.objects;
                return Err(ApiError::ListTooLong { kind, all, pages, objects });
            }
        };
        log::debug!("{objects} {} at resource version {version}", self.objects.all);
        (self.version, self.must_list) = (version, false);
        self.decoder.finish_list();
        self.decoder.send().await;
        self.state.send_modify(|state| {
            state.relists += 1;
            state.last_sync = Some(Timestamp::now());
        });
        Ok(())
    }

    async fn apply_line(&mut self, line: &[u8]) -> Result<(), ApiError> {
        let (is_of_object, version) = self.decoder.add_line(line)?;
        self.decoder.send().await;
        self.version = version;
        self.state.send_modify(|state| {
            state.events += u64::from(is_of_object);
            state.last_sync = Some(Timestamp::now());
        });
        Ok(())
    }

    fn connected(&mut self) {
        if self.last_logged.take().is_some() {
            log::info!("{} watch re-established", self.objects.kind);
        }
        self.state.send_modify(WatchState::connect);
    }

    fn on_error(&mut self, error: &ApiError, delay: Duration) {
        let described = self.api.as_ref().map(|api| api.describe(self.objects.path, error));
        let mut text = described.unwrap_or_else(|| with_causes(error));
        if error.kind() == ErrorKind::Forbidden {
            text.push_str(self.objects.if_forbidden);
        }
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
            log::warn!("{} watch failed, keeping existing exemptions: {text}", self.objects.kind);
            self.last_logged = Some(text);
        }
    }
}
