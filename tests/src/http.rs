//! HTTP client for the agent's metrics and health endpoints.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
};

use crate::{TestEnv, poll::poll_until, probe::LONG};

/// Default listen address of the agent.
pub const DEFAULT: &str = "127.0.0.1:9254";

/// Response to a GET request.
#[derive(Clone, Debug)]
pub struct Response {
    /// HTTP status code.
    pub status: u16,
    /// Status line and header.
    pub head: String,
    /// Response body.
    pub body: String,
}

impl Response {
    /// Reports whether the header has this line.
    #[must_use]
    pub fn has_header(&self, line: &str) -> bool {
        self.head.split("\r\n").any(|of_head| of_head.eq_ignore_ascii_case(line))
    }
}

/// Returns status and body of the response to a GET.
pub fn exchange(stream: impl Read + Write, path: &str) -> io::Result<(u16, String)> {
    let Response { status, body, .. } = get(stream, path, "")?;
    Ok((status, body))
}

/// Sends a GET request with additional header lines.
fn get(mut stream: impl Read + Write, path: &str, header: &str) -> io::Result<Response> {
    write!(stream, "GET {path} HTTP/1.1\r\nHost: node\r\n{header}\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(|| io::Error::other(answer.clone()))?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    let status = status.ok_or_else(|| io::Error::other(head))?;
    Ok(Response { status, head: head.to_owned(), body: body.to_owned() })
}

/// Sends a GET to an address of the node.
pub fn try_get(env: &TestEnv, at: &str, path: &str) -> io::Result<(u16, String)> {
    connect(env, at, |stream| exchange(stream, path))
}

/// Sends a GET with an `Accept` header to an address of the node.
pub fn try_get_as(env: &TestEnv, at: &str, path: &str, accept: &str) -> io::Result<Response> {
    connect(env, at, |stream| get(stream, path, &format!("Accept: {accept}\r\n")))
}

impl TestEnv {
    /// Returns the agent's metrics. Waits for them, because the agent listens a moment after `status` says that it is ready.
    #[track_caller]
    #[must_use]
    pub fn metrics(&self) -> String {
        poll_until(LONG, "the agent's metrics", || try_get(self, DEFAULT, "/metrics").ok()).1
    }

    /// Returns the value of a series in the agent's metrics.
    #[track_caller]
    #[must_use]
    pub fn metric(&self, series: &str) -> u64 {
        let metrics = self.metrics();
        let mut lines = metrics.lines();
        let value = lines.find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok());
        value.unwrap_or_else(|| panic!("no {series} in:\n{metrics}"))
    }
}

fn connect<T: Send>(
    env: &TestEnv,
    at: &str,
    exchange: impl FnOnce(TcpStream) -> io::Result<T> + Send,
) -> io::Result<T> {
    let address: SocketAddr = at.parse().expect("an address with a port");
    env.node.run(|| {
        let stream = TcpStream::connect_timeout(&address, LONG)?;
        stream.set_read_timeout(Some(LONG))?;
        exchange(stream)
    })
}
