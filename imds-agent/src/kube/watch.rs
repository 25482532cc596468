//! List and watch of the pods of one node, with retries until it is dropped.
//!
//! While the server is unreachable, the last known pods stay. Pods that the server has not reported are unknown.

use std::time::Duration;

use jiff::Timestamp;
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
    time::{Instant, sleep, timeout, timeout_at},
};

use super::{
    api::{Api, ApiError, ErrorKind, News, PODS, Page, Since, with_causes},
    backoff::{Attempts, Backoff},
    index::MOST_PODS,
    pod::Pod,
    state::WatchState,
};
use crate::config::Access;

/// A watch that ends sooner than this without an event counts as a failure.
const SHORTEST: Duration = Duration::from_secs(1);

/// Settings of the pod watch.
#[derive(Clone, Debug)]
pub struct Options {
    /// Name of the node whose pods are watched.
    pub node: String,
    /// Number of pods per page of a list.
    pub page: u32,
    /// Upper bound of the pages of a list. Must suffice for all pods of the largest clusters, because a server may
    /// ignore field selectors.
    pub most_pages: usize,
    /// Duration of a watch, after which the next one continues. Bounds the time for which a silently broken connection
    /// stays unnoticed.
    pub watch: Duration,
    /// Timeout for an answer of the server.
    pub answer: Duration,
    /// Backoff between attempts after an error.
    pub backoff: Backoff,
}

impl Options {
    /// Returns settings that suit clusters of any size.
    #[must_use]
    pub fn new(node: String) -> Self {
        Self {
            node,
            page: 50,
            most_pages: 10_000,
            watch: Duration::from_mins(2),
            answer: Duration::from_secs(30),
            backoff: Backoff::default(),
        }
    }
}

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
        let event = News::from_json(json).and_then(|news| news.into_event(node));
        event.map(|(event, _)| event).map_err(|error| error.kind())
    }

    /// Parses a list of one page, and keeps the pods of `node`.
    pub fn from_list(json: &[u8], node: &str) -> Result<Self, ErrorKind> {
        let page = Page::from_json(json).map_err(|error| error.kind())?;
        Ok(Self::Relist(page.pods_of(node).collect()))
    }
}

/// Pod watch that runs in the background. Dropping it ends the watch.
#[derive(Debug)]
pub struct Watch {
    events: mpsc::Receiver<PodEvent>,
    state: watch::Receiver<WatchState>,
    task: JoinHandle<()>,
}

impl Watch {
    /// Starts the watch. Must be called within a tokio runtime.
    ///
    /// The watch retries forever, even if the kubeconfig file does not exist yet.
    #[must_use]
    pub fn start(access: Access, options: Options) -> Self {
        let (to_events, events) = mpsc::channel(64);
        let (to_state, state) = watch::channel(WatchState::new());
        let follower = Follower {
            attempts: Attempts::new(options.backoff),
            access,
            options,
            api: None,
            list_since: Since::Any,
            version: None,
            events: to_events,
            state: to_state,
            said: None,
        };
        Self { events, state, task: tokio::spawn(follower.run()) }
    }

    /// Waits for the next event. Cancel safe.
    pub async fn next(&mut self) -> Option<PodEvent> {
        self.events.recv().await
    }

    /// Returns a receiver of the state of the watch.
    #[must_use]
    pub fn state(&self) -> watch::Receiver<WatchState> {
        self.state.clone()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The receiver of the events was dropped.
struct Unheard;

/// Reason why the watch stopped.
enum Interruption {
    Failed(ApiError),
    Unheard,
}

impl From<ApiError> for Interruption {
    fn from(error: ApiError) -> Self {
        Self::Failed(error)
    }
}

impl From<Unheard> for Interruption {
    fn from(Unheard: Unheard) -> Self {
        Self::Unheard
    }
}

struct Follower {
    access: Access,
    options: Options,
    api: Option<Api>,
    list_since: Since,
    /// Resource version after all events so far, or `None` if all pods must be listed again.
    version: Option<String>,
    attempts: Attempts,
    events: mpsc::Sender<PodEvent>,
    state: watch::Sender<WatchState>,
    /// Last logged error, so that an error is logged once and not with every attempt.
    said: Option<String>,
}

impl Follower {
    async fn run(mut self) {
        loop {
            let error = match self.follow().await {
                Ok(()) => continue,
                Err(Interruption::Unheard) => return,
                Err(Interruption::Failed(error)) => error,
            };
            let pause = self.attempts.failed(error.retry_after());
            self.learn_from(&error, pause);
            sleep(pause).await;
        }
    }

    /// Lists all pods if necessary, then watches them until the server ends the watch.
    async fn follow(&mut self) -> Result<(), Interruption> {
        let api = match self.api.take() {
            Some(api) => api,
            None => Api::new(&self.access, &self.options.node).await?,
        };
        let followed = self.follow_by(&api).await;
        self.api = Some(api);
        followed
    }

    async fn follow_by(&mut self, api: &Api) -> Result<(), Interruption> {
        let version = match &self.version {
            Some(version) => version.clone(),
            None => self.relist(api).await?,
        };
        let start = Instant::now();
        let answer = self.options.answer;
        let lines = timeout(answer, api.watch(&version, self.options.watch)).await;
        let mut lines = lines.map_err(|_| ApiError::Silent { after: answer })??;
        self.connected();
        let deadline = start + self.options.watch + answer;
        let mut is_silent = true;
        loop {
            let Ok(news) = timeout_at(deadline, lines.next()).await else {
                return Err(ApiError::Silent { after: start.elapsed() }.into());
            };
            let Some(news) = news? else { break };
            self.take_in(news).await?;
            is_silent = false;
            self.attempts.succeeded();
        }
        if is_silent && start.elapsed() < SHORTEST {
            return Err(ApiError::BrokeOff { source: None }.into());
        }
        self.attempts.succeeded();
        Ok(())
    }

    async fn relist(&mut self, api: &Api) -> Result<String, Interruption> {
        let (mut pods, mut next, mut pages) = (Vec::new(), None::<String>, 0);
        let version = loop {
            let answer = self.options.answer;
            let page = timeout(answer, api.list(&self.list_since, self.options.page, next.as_deref())).await;
            let page = page.map_err(|_| ApiError::Silent { after: answer })?;
            if let Err(ApiError::Gone { .. }) = page {
                self.list_since = Since::Newest;
            }
            let page = page?;
            pages += 1;
            next.clone_from(&page.next);
            let version = page.resource_version.clone();
            pods.extend(page.pods_of(&self.options.node));
            if next.is_none() {
                break version;
            }
            if pods.len() > MOST_PODS || pages >= self.options.most_pages {
                return Err(ApiError::Endless { pages, pods: pods.len() }.into());
            }
        };
        log::debug!("{} pods on this node at resource version {version}", pods.len());
        self.tell(PodEvent::Relist(pods)).await?;
        self.state.send_modify(|state| {
            state.relists += 1;
            state.last_sync = Some(Timestamp::now());
        });
        self.proceed_to(version.clone());
        Ok(version)
    }

    async fn take_in(&mut self, news: News) -> Result<(), Interruption> {
        let (event, version) = news.into_event(&self.options.node)?;
        let is_of_pod = event.is_some();
        if let Some(event) = event {
            self.tell(event).await?;
        }
        self.proceed_to(version);
        self.state.send_modify(|state| {
            state.events += u64::from(is_of_pod);
            state.last_sync = Some(Timestamp::now());
        });
        Ok(())
    }

    async fn tell(&self, event: PodEvent) -> Result<(), Unheard> {
        self.events.send(event).await.map_err(|_| Unheard)
    }

    fn proceed_to(&mut self, version: String) {
        // A server that lags behind must not revert events of another one.
        self.list_since = Since::NotOlderThan(version.clone());
        self.version = Some(version);
    }

    fn connected(&mut self) {
        if self.said.take().is_some() {
            log::info!("pod watch re-established");
        }
        self.state.send_modify(WatchState::connect);
    }

    fn learn_from(&mut self, error: &ApiError, pause: Duration) {
        let described = self.api.as_ref().map(|api| api.describe(PODS, error));
        let text = described.unwrap_or_else(|| with_causes(error));
        match error.kind() {
            // Only a complete list contains the missed events.
            ErrorKind::Gone | ErrorKind::Malformed => self.version = None,
            // Credentials and addresses may have changed: read them again.
            ErrorKind::Config | ErrorKind::Connect | ErrorKind::Timeout | ErrorKind::Refused => {
                self.api = None;
            }
            ErrorKind::Closed | ErrorKind::Throttled | ErrorKind::Server => {}
        }
        let kind = error.kind();
        self.state.send_modify(|state| state.fail(kind, text.clone(), pause));
        let is_usual = matches!(kind, ErrorKind::Gone | ErrorKind::Closed);
        if is_usual || self.said.as_ref() == Some(&text) {
            log::debug!("{text}");
        } else {
            log::warn!("pod watch failed, keeping existing exemptions: {text}");
            self.said = Some(text);
        }
    }
}
