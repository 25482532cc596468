//! Errors of sinks, and the result of writing a batch.

use std::{error::Error, io, path::PathBuf, time::Duration};

use http::StatusCode;
use thiserror::Error;

/// Error that keeps a sink from writing.
#[derive(Debug, Error)]
pub(super) enum SinkError {
    /// A call on a file or a socket failed.
    #[error("failed to {verb} {target}")]
    Io { verb: &'static str, target: String, source: io::Error },
    /// The path of a log file belongs to something else.
    #[error("{} is not a regular file", .0.display())]
    NotAFile(PathBuf),
    /// Other users could redirect the records.
    #[error("{} {reason}", path.display())]
    Unsafe { path: PathBuf, reason: &'static str },
    /// No process reads standard output.
    #[error("standard output is not read")]
    NotRead,
    /// The content of a file is not the value of a header.
    #[error("{} does not contain the value of a header in one line", .0.display())]
    InvalidHeader(PathBuf),
    /// The HTTP client cannot be created, for example because the certificates cannot be read.
    #[error("failed to create the HTTP client")]
    Client(#[source] Box<kube_client::Error>),
    /// The runtime of the HTTP client cannot be created.
    #[error("failed to create the runtime of the HTTP client")]
    Runtime(#[source] io::Error),
    /// The request failed, or its response cannot be read.
    #[error("the request failed")]
    Request(#[source] Box<dyn Error + Send + Sync>),
    /// The receiver did not respond in time.
    #[error("no response within {0:?}")]
    Timeout(Duration),
    /// The receiver responded with an error.
    #[error("response {status}: {message}")]
    Status { status: StatusCode, message: String },
    /// The receiver accepted only a part of the records.
    #[error("{count} records were rejected: {message}")]
    PartialSuccess { count: usize, message: String },
    /// A record is larger than the messages of the socket.
    #[error("a record is too long for {target}")]
    TooLong { target: String },
}

/// Returns the conversion of an error of a call on `target`.
pub(super) fn io_failed(verb: &'static str, target: &impl ToString) -> impl FnOnce(io::Error) -> SinkError {
    let target = target.to_string();
    move |source| SinkError::Io { verb, target, source }
}

/// Result of writing a batch.
#[derive(Debug, Default)]
pub(super) struct Sent {
    /// Number of records, from the start of the batch, that are not to be written again.
    pub(super) done: usize,
    /// Number of these records that the receiver did not accept.
    pub(super) failed: usize,
    pub(super) failure: Option<Failure>,
}

#[derive(Debug)]
pub(super) enum Failure {
    /// The rest of the batch is to be written later, at the earliest after the delay that the receiver requests.
    Retry { error: SinkError, after: Option<Duration> },
    /// The receiver did not accept some records and will not accept them later.
    Rejected(SinkError),
}

impl Sent {
    pub(super) fn all(count: usize) -> Self {
        Self { done: count, ..Self::default() }
    }

    /// Returns the result of a batch of which `done` records were written before an error.
    pub(super) fn until(done: usize, error: SinkError) -> Self {
        Self { done, failed: 0, failure: Some(Failure::Retry { error, after: None }) }
    }
}
