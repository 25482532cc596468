//! Requests to the API server.

pub(crate) mod daemon_sets;
pub(crate) mod exec;
pub(crate) mod metrics_proxy;
pub(crate) mod pods;

use std::{path::PathBuf, time::Duration};

use http::{Request, header};
use kube_client::{
    Client, Config, Error as KubeError,
    config::{InClusterError, KubeConfigOptions, Kubeconfig, KubeconfigError},
};
use serde::{Deserialize, de::DeserializeOwned};
use thiserror::Error;
use tokio::time::{sleep, timeout};

use crate::escape::escape;

/// Name of the plugin in the audit log of the API server.
const USER_AGENT: &str = concat!("kubectl-imds/", env!("CARGO_PKG_VERSION"));
/// Pause after a response that the server is busy (429): `Retry-After` of the API server is one second.
const BUSY_DELAY: Duration = Duration::from_secs(1);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Objects of one page, as many as kubectl requests.
const PAGE: &str = "500";

/// Options that select the cluster, as those of kubectl.
#[derive(Clone, Debug, Default)]
pub(crate) struct Access {
    pub(crate) kubeconfig: Option<PathBuf>,
    pub(crate) context: Option<String>,
}

/// Client of the API server.
#[derive(Clone)]
pub(crate) struct Api {
    client: Client,
    /// Namespace of the context; `default` if it names none.
    pub(crate) namespace: String,
    /// Limit of one request, or of a command in one pod.
    pub(crate) request_timeout: Duration,
}

#[derive(Debug, Error)]
pub(crate) enum ApiError {
    #[error("failed to read the kubeconfig: {source}")]
    Kubeconfig { source: Box<KubeconfigError> },
    #[error("no kubeconfig is set, and this is no pod: {source}")]
    InCluster { source: InClusterError },
    #[error("failed to create a client: {source}")]
    Client { source: Box<KubeError> },
    #[error("no answer within {after:?}")]
    Timeout { after: Duration },
    #[error("no permission: {message}")]
    Forbidden { message: String },
    #[error("{message} (HTTP status {code})")]
    Status { code: u16, message: String },
    #[error("{}", with_causes(.source))]
    Request { source: Box<KubeError> },
    #[error("failed to read the response: {source}")]
    Malformed { source: serde_json::Error },
    #[error("failed to read the response: {source}")]
    Read { source: std::io::Error },
    #[error("the output is longer than {limit} bytes")]
    TooLong { limit: usize },
    #[error("the connection to the pod ended before its command did")]
    ConnectionClosed,
    #[error("{message}")]
    Exec { message: String },
}

impl ApiError {
    pub(crate) fn is_forbidden(&self) -> bool {
        matches!(self, Self::Forbidden { .. })
    }
}

impl From<KubeError> for ApiError {
    fn from(error: KubeError) -> Self {
        match error {
            KubeError::Api(status) => {
                let message = escape(&status.message).into_owned();
                if status.code == 403 {
                    Self::Forbidden { message }
                } else {
                    Self::Status { code: status.code, message }
                }
            }
            source => Self::Request { source: Box::new(source) },
        }
    }
}

/// Returns an error with its causes. Each library adds one level, and some repeat their cause.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    escape(&text).into_owned()
}

/// Page of a list.
#[derive(Debug, Deserialize)]
struct Page<T> {
    #[serde(default)]
    metadata: PageMetadata,
    items: Vec<T>,
}

#[derive(Debug, Default, Deserialize)]
struct PageMetadata {
    #[serde(default, rename = "continue")]
    next: Option<String>,
}

impl Api {
    /// Connects with the kubeconfig of `access`, of `KUBECONFIG` or of the home directory; in a pod without any, with its
    /// service account.
    pub(crate) async fn new(access: &Access, request_timeout: Duration) -> Result<Self, ApiError> {
        let options = KubeConfigOptions { context: access.context.clone(), ..KubeConfigOptions::default() };
        let kubeconfig = match &access.kubeconfig {
            Some(path) => Kubeconfig::read_from(path),
            None => Kubeconfig::read(),
        };
        let unreadable = |source| ApiError::Kubeconfig { source: Box::new(source) };
        let mut config = match kubeconfig {
            Ok(kubeconfig) => {
                Config::from_custom_kubeconfig(kubeconfig, &options).await.map_err(unreadable)?
            }
            Err(error) if access.kubeconfig.is_some() || std::env::var_os("KUBECONFIG").is_some() => {
                return Err(unreadable(error));
            }
            Err(_) => Config::incluster().map_err(|source| ApiError::InCluster { source })?,
        };
        if config.root_cert.is_none()
            && (config.accept_invalid_certs || config.cluster_url.scheme_str() == Some("http"))
        {
            // No certificate is verified: the system's need not be loaded.
            config.root_cert = Some(Vec::new());
        }
        config.connect_timeout = Some(CONNECT_TIMEOUT);
        // Events can be rare: the connection of `events` must not end by a limit between two of them.
        config.read_timeout = None;
        // The library repeats also what another attempt does not change, such as a request to an agent without metrics.
        config.default_retry = false;
        let namespace = config.default_namespace.clone();
        let client =
            Client::try_from(config).map_err(|source| ApiError::Client { source: Box::new(source) })?;
        Ok(Self { client, namespace, request_timeout })
    }

    /// Sends a request, and repeats it while the server is busy.
    async fn with_timeout<T>(&self, request: impl AsyncFn() -> Result<T, ApiError>) -> Result<T, ApiError> {
        let after = self.request_timeout;
        let attempts = async {
            loop {
                match request().await {
                    Err(ApiError::Status { code: 429, .. }) => sleep(BUSY_DELAY).await,
                    outcome => return outcome,
                }
            }
        };
        timeout(after, attempts).await.unwrap_or(Err(ApiError::Timeout { after }))
    }

    /// Requests all pages of a list. `fold` takes each object, so that at most one page is in memory.
    async fn list<T: DeserializeOwned>(
        &self,
        path: &str,
        accept: &str,
        selectors: &[(&str, &str)],
        mut fold: impl FnMut(T),
    ) -> Result<(), ApiError> {
        let mut next = None::<String>;
        loop {
            let mut query = form_urlencoded::Serializer::new(String::new());
            query.append_pair("limit", PAGE);
            selectors.iter().filter(|(_, selector)| !selector.is_empty()).for_each(|(name, selector)| {
                query.append_pair(name, selector);
            });
            if let Some(next) = &next {
                query.append_pair("continue", next);
            }
            let target = format!("{path}?{}", query.finish());
            let text = self
                .with_timeout(async || Ok(self.client.request_text(get(&target, accept)?).await?))
                .await?;
            let page: Page<T> =
                serde_json::from_str(&text).map_err(|source| ApiError::Malformed { source })?;
            page.items.into_iter().for_each(&mut fold);
            next = page.metadata.next.filter(|next| !next.is_empty());
            if next.is_none() {
                return Ok(());
            }
        }
    }
}

fn get(target: &str, accept: &str) -> Result<Request<Vec<u8>>, ApiError> {
    let request = Request::get(target).header(header::USER_AGENT, USER_AGENT).header(header::ACCEPT, accept);
    let invalid = |source| ApiError::Request { source: Box::new(KubeError::HttpError(source)) };
    request.body(Vec::new()).map_err(invalid)
}
