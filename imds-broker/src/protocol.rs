//! Messages between the agent and the broker.
//!
//! They travel over a Unix socket of type `SOCK_SEQPACKET`, which the broker inherits as its standard input: one JSON object in
//! each packet. [`ToBroker::Listen`] carries exactly one descriptor (`SCM_RIGHTS`): a TCP socket that listens in the pod's network
//! namespace. The broker ends when the agent closes the socket, and the kernel kills it when the agent dies.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// Longest message in bytes. Both sides discard longer ones.
pub const MAX_MESSAGE: usize = 32 * 1024;

/// Message of the agent.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum ToBroker {
    /// Starts to serve the listener that comes with this message.
    Listen {
        /// Number that the agent has chosen. No other open listener has it.
        id: u32,
        /// Address and port of the metadata service, which the broker connects to from the node's network namespace.
        endpoint: SocketAddr,
        /// Name of the provider, such as `azure`. It decides which headers the broker forwards.
        provider: String,
        /// Requests that the pod may make, in the form that [`crate::allow`] describes. Keywords are already expanded. Without any,
        /// the broker answers each request with an explanation of the denial, and never connects to the metadata service.
        allow: Vec<String>,
    },
    /// Closes a listener and all its connections.
    Close {
        /// Number of the listener.
        id: u32,
    },
    /// Asks for [`FromBroker::Pong`]. The agent restarts a broker that does not answer.
    Ping {},
}

/// Message of the broker.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum FromBroker {
    /// The broker has dropped its privileges and serves.
    Ready {},
    /// Answer to [`ToBroker::Ping`].
    Pong {},
    /// The broker serves the listener.
    Listening {
        /// Number of the listener.
        id: u32,
    },
    /// The broker has closed the listener: at the agent's request, or after an error.
    Closed {
        /// Number of the listener.
        id: u32,
        /// Reason, if the agent did not request it.
        error: Option<String>,
    },
    /// A request of a pod. The broker limits the number of these messages.
    Request(Request),
}

/// Request of a pod and its result. It contains no header, no query and no body.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Number of the listener.
    pub id: u32,
    /// Method, at most 16 bytes of printable ASCII.
    pub method: String,
    /// Path without the query, at most 256 bytes of printable ASCII. A longer path is truncated.
    pub path: String,
    /// Version of the IMDS of AWS: 1 for a request without a session token, 2 with one. `None` for other providers.
    pub imds_version: Option<u8>,
    /// Result.
    pub outcome: Outcome,
    /// HTTP status that the pod received.
    pub status: u16,
    /// Reason why the broker refused the request, or could not forward it. Empty for [`Outcome::Allowed`].
    pub reason: String,
    /// Further requests of the same listener with the same outcome since its last message, which the limit suppressed.
    pub suppressed: u64,
}

/// Result of a request.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The broker forwarded the request, and the response to the pod.
    Allowed,
    /// The broker refused the request: no rule allows it, it is malformed, or it exceeds a limit.
    Refused,
    /// The broker could not reach the metadata service, or the response exceeds a limit.
    Failed,
}
