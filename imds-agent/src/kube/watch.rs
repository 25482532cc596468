//! Follows the pods of one node, whatever the API server does.
//!
//! What was told stays known while the server is away; what it has not told of is unknown.

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

/// A watch that ends sooner than this, and without a word, is one that the server does not want.
const SHORTEST: Duration = Duration::from_secs(1);

/// How to watch.
#[derive(Clone, Debug)]
pub struct Options {
    /// Name of the node whose pods are followed.
    pub node: String,
    /// How many pods are asked for at a time.
    pub page: u32,
    /// Most parts of a list. It has to do for all pods of the largest clusters: a server may know nothing of field selectors.
    pub most_pages: usize,
    /// How long a watch lasts before the next one starts where it ended: what a connection that died silently can hide.
    pub watch: Duration,
    /// How long the server may take for an answer.
    pub answer: Duration,
    /// How long to wait after a failure.
    pub backoff: Backoff,
}

impl Options {
    /// What suits a cluster of any size.
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

/// News of the node's pods.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum PodEvent {
    /// These are all.
    Relist(Vec<Pod>),
    /// One is new, or another than before.
    Apply(Pod),
    /// One is gone.
    Delete {
        /// Its id.
        uid: String,
    },
}

impl PodEvent {
    /// What a line of a watch says of the pods of `node`; `None` where it says nothing of any.
    pub fn from_line(json: &[u8], node: &str) -> Result<Option<Self>, ErrorKind> {
        let event = News::from_json(json).and_then(|news| news.into_event(node));
        event.map(|(event, _)| event).map_err(|error| error.kind())
    }

    /// What a list says, where it is all of it.
    pub fn from_list(json: &[u8], node: &str) -> Result<Self, ErrorKind> {
        let page = Page::from_json(json).map_err(|error| error.kind())?;
        Ok(Self::Relist(page.pods_of(node).collect()))
    }
}

/// A watch in the background. It ends when dropped.
#[derive(Debug)]
pub struct Watch {
    events: mpsc::Receiver<PodEvent>,
    state: watch::Receiver<WatchState>,
    task: JoinHandle<()>,
}

impl Watch {
    /// Starts to watch. Must be called within a tokio runtime.
    ///
    /// It tries for as long as it takes: also a kubeconfig that is not there yet is waited for.
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

    /// The next piece of news. Nothing is lost when this is cancelled.
    pub async fn next(&mut self) -> Option<PodEvent> {
        self.events.recv().await
    }

    /// How the watch is doing, now and from now on.
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

/// Nobody listens any more.
struct Unheard;

/// Why following stopped for now.
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
    /// State of the store that all news so far add up to; `None` where all pods must be read.
    version: Option<String>,
    attempts: Attempts,
    events: mpsc::Sender<PodEvent>,
    state: watch::Sender<WatchState>,
    /// What failed last, so that it is said once and not with every attempt.
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

    /// Reads all pods if need be, then follows them until the server ends the watch.
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
        // A server that is behind must not take back what another one told.
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
            // What was missed is only in the whole.
            ErrorKind::Gone | ErrorKind::Malformed => self.version = None,
            // Credentials and addresses may be others by now.
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
