//! Errors of requests to the API server.

use std::{error::Error, path::PathBuf, time::Duration};

use kube_client::config::{InClusterError, KubeconfigError};
use serde::{Deserialize, Serialize};
use strum::IntoStaticStr;
use thiserror::Error;

/// Upper bound of the `Retry-After` time that the agent respects.
pub(super) const MAX_RETRY_AFTER: Duration = Duration::from_mins(5);

/// Error of a request to the API server.
#[derive(Debug, Error)]
pub(super) enum ApiError {
    #[error("failed to read the kubeconfig {}", path.display())]
    Kubeconfig { path: PathBuf, source: Box<KubeconfigError> },
    #[error("failed to find the API server from within the cluster")]
    InCluster { source: InClusterError },
    #[error("failed to create a client of the API server")]
    Client { source: Box<kube_client::Error> },
    #[error("failed to reach the API server")]
    Unreachable { source: Box<kube_client::Error> },
    #[error("the API server did not answer within {after:?}")]
    Timeout { after: Duration },
    #[error("the API server closed the connection while sending a response")]
    ConnectionClosed { source: Option<Box<dyn Error + Send + Sync>> },
    #[error("the API server no longer has the requested resource version: {message}")]
    Expired { message: String },
    #[error("the API server throttles requests")]
    Throttled { retry_after: Option<Duration> },
    #[error("the API server denied the request ({code}): {message}")]
    Forbidden { code: u16, message: String },
    #[error("the API server returned an error ({code}): {message}")]
    Failed { code: u16, message: String },
    #[error("failed to parse the response of the API server")]
    Malformed { source: serde_json::Error },
    #[error("the response of the API server has no {what}")]
    Incomplete { what: &'static str },
    #[error("the response of the API server is longer than {limit} bytes")]
    TooLong { limit: usize },
    #[error("the {kind} list of the API server is too long: {objects} {all} in {pages} pages")]
    ListTooLong { kind: &'static str, all: &'static str, pages: usize, objects: usize },
}

/// Kinds of errors, as metrics count them. Metrics and JSON have the same names.
#[derive(Clone, Copy, Debug, Deserialize, Eq, IntoStaticStr, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
pub enum ErrorKind {
    /// The configuration of the API client is missing or invalid.
    Config,
    /// The API server cannot be reached.
    Connect,
    /// The API server does not answer in time.
    Timeout,
    /// The API server closed the connection before the end of a response.
    Closed,
    /// The API server no longer has the requested resource version (410).
    Expired,
    /// The API server asks to retry later (429).
    Throttled,
    /// The API server does not allow the agent to read the objects (401, 403).
    Forbidden,
    /// The API server returned another error.
    Server,
    /// The API server sent an invalid response.
    Malformed,
}

impl ApiError {
    pub(super) fn closed(source: impl Error + Send + Sync + 'static) -> Self {
        Self::ConnectionClosed { source: Some(Box::new(source)) }
    }

    pub(super) fn kind(&self) -> ErrorKind {
        match self {
            Self::Kubeconfig { .. } | Self::InCluster { .. } | Self::Client { .. } => ErrorKind::Config,
            Self::Unreachable { .. } => ErrorKind::Connect,
            Self::Timeout { .. } => ErrorKind::Timeout,
            Self::ConnectionClosed { .. } => ErrorKind::Closed,
            Self::Expired { .. } => ErrorKind::Expired,
            Self::Throttled { .. } => ErrorKind::Throttled,
            Self::Forbidden { .. } => ErrorKind::Forbidden,
            Self::Failed { .. } => ErrorKind::Server,
            Self::Malformed { .. }
            | Self::Incomplete { .. }
            | Self::TooLong { .. }
            | Self::ListTooLong { .. } => ErrorKind::Malformed,
        }
    }

    /// Returns the HTTP status code of an answer that refuses a request.
    pub(super) fn code(&self) -> Option<u16> {
        match self {
            Self::Forbidden { code, .. } | Self::Failed { code, .. } => Some(*code),
            _ => None,
        }
    }

    /// Returns the delay that the server requests before the next attempt.
    pub(super) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Throttled { retry_after } => retry_after.map(|delay| delay.min(MAX_RETRY_AFTER)),
            _ => None,
        }
    }
}

/// Status object, with which the API server answers a failed request.
#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct Status {
    pub(super) code: u16,
    message: String,
    details: Option<StatusDetails>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct StatusDetails {
    retry_after_seconds: Option<u64>,
}

impl Status {
    /// Returns the status of an answer that is no `Status` object, as of a proxy in front of the API server.
    pub(super) fn from_text(message: String) -> Self {
        Self { message, ..Self::default() }
    }

    /// Converts to an error. `retry_after` is the header `Retry-After` in seconds.
    pub(super) fn into_error(self, retry_after: Option<u64>) -> ApiError {
        let Self { code, message, details } = self;
        let seconds = retry_after.or_else(|| details?.retry_after_seconds);
        let line = message.lines().next().unwrap_or_default();
        let message: String = line.chars().filter(|char| !char.is_control()).take(200).collect();
        match code {
            410 => ApiError::Expired { message },
            // A server whose etcd was restored from a backup no longer has newer versions.
            _ if message.contains("Too large resource version") => ApiError::Expired { message },
            429 => ApiError::Throttled { retry_after: seconds.map(Duration::from_secs) },
            401 | 403 => ApiError::Forbidden { code, message },
            _ => ApiError::Failed { code, message },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_errors_name_the_remedy() {
        let kind = |json: &str| serde_json::from_str::<Status>(json).unwrap().into_error(None).kind();
        assert_eq!(kind(r#"{"code":410,"message":"too old resource version"}"#), ErrorKind::Expired);
        assert_eq!(
            kind(r#"{"code":504,"message":"Timeout: Too large resource version: 9"}"#),
            ErrorKind::Expired
        );
        assert_eq!(kind(r#"{"code":403}"#), ErrorKind::Forbidden);
        assert_eq!(kind(r#"{"code":500,"message":"etcd"}"#), ErrorKind::Server);
        let throttled = r#"{"code":429,"details":{"retryAfterSeconds":9999}}"#;
        let error = serde_json::from_str::<Status>(throttled).unwrap().into_error(None);
        assert_eq!(error.retry_after(), Some(MAX_RETRY_AFTER));
    }
}
