//! Commands in pods, through the subresource `exec` over a WebSocket.
//!
//! The first byte of each message is the number of its channel. The protocol is that of
//! `k8s.io/apimachinery/pkg/util/remotecommand` (`v5.channel.k8s.io`).

use std::collections::VecDeque;

use futures_util::{StreamExt as _, stream::BoxStream};
use serde::Deserialize;
use tokio::time::timeout;

use super::{Api, ApiError, get};
use crate::escape::escape;

const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const STATUS: u8 = 3;
/// Longest output of a command in bytes. The status of a node with 5,000 interfaces has about 4 MB.
const MAX_OUTPUT: usize = 8 << 20;
/// Longest recorded standard error in bytes. Further bytes are dropped.
const MAX_STDERR: usize = 16 << 10;
/// Longest line of a stream in bytes. The rest of the line is dropped.
const MAX_LINE: usize = 64 << 10;

/// Messages of a command, each with its channel.
type Messages = BoxStream<'static, Result<(u8, Vec<u8>), ApiError>>;

/// Container of the agent on a node.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Container<'a> {
    pub(crate) namespace: &'a str,
    pub(crate) pod: &'a str,
    pub(crate) name: &'a str,
}

/// Result of a command.
#[derive(Debug, Default)]
pub(crate) struct Output {
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    pub(crate) exit_code: i32,
}

impl Output {
    /// Returns the last line of standard error, which gives the cause of a failure.
    pub(crate) fn last_error(&self) -> String {
        let stderr = String::from_utf8_lossy(&self.stderr);
        let line = stderr.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("no message");
        escape(line.trim()).into_owned()
    }
}

/// Status object at the end of a command.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct EndStatus {
    status: String,
    message: String,
    reason: String,
    details: Details,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Details {
    causes: Vec<Cause>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Cause {
    reason: String,
    message: String,
}

/// Returns the exit code of the command. Fails if the command did not start.
fn exit_code(status: &[u8]) -> Result<i32, ApiError> {
    let status: EndStatus =
        serde_json::from_slice(status).map_err(|source| ApiError::Malformed { source })?;
    if status.status == "Success" {
        return Ok(0);
    }
    let code = status.details.causes.iter().find(|cause| cause.reason == "ExitCode");
    match code.and_then(|code| code.message.parse().ok()) {
        Some(code) if status.reason == "NonZeroExitCode" => Ok(code),
        _ => Err(ApiError::Exec { message: escape(&status.message).into_owned() }),
    }
}

impl Api {
    /// Runs a command and returns its output.
    pub(crate) async fn exec(&self, container: Container<'_>, command: &[&str]) -> Result<Output, ApiError> {
        let run = async || {
            let mut messages = self.open(container, command).await?;
            let mut output = Output::default();
            while let Some((channel, data)) = messages.next().await.transpose()? {
                match channel {
                    STDOUT if output.stdout.len() + data.len() > MAX_OUTPUT => {
                        return Err(ApiError::TooLong { limit: MAX_OUTPUT });
                    }
                    STDOUT => output.stdout.extend(data),
                    STDERR => {
                        output.stderr.extend(data);
                        output.stderr.truncate(MAX_STDERR);
                    }
                    STATUS => {
                        output.exit_code = exit_code(&data)?;
                        return Ok(output);
                    }
                    _ => {}
                }
            }
            Err(ApiError::ConnectionClosed)
        };
        self.with_timeout(run).await
    }

    /// Starts a command whose output is read line by line.
    pub(crate) async fn exec_lines(
        &self,
        container: Container<'_>,
        command: &[&str],
    ) -> Result<Lines, ApiError> {
        let after = self.request_timeout;
        let opened = timeout(after, self.open(container, command)).await;
        let messages = opened.unwrap_or(Err(ApiError::Timeout { after }))?;
        Ok(Lines { messages, buffer: LineBuffer::default(), stderr: Vec::new() })
    }

    async fn open(&self, container: Container<'_>, command: &[&str]) -> Result<Messages, ApiError> {
        let target = target(container, command);
        let stream = self.client.connect(get(&target, "*/*")?).await?.into_stream();
        let messages = stream.filter_map(async |message| match message {
            Ok(message) if message.is_binary() || message.is_text() => {
                let data = message.into_data();
                let (&channel, data) = data.split_first()?;
                Some(Ok((channel, data.to_vec())))
            }
            Ok(_) => None,
            Err(_) => Some(Err(ApiError::ConnectionClosed)),
        });
        Ok(messages.boxed())
    }
}

fn target(Container { namespace, pod, name }: Container<'_>, command: &[&str]) -> String {
    let mut query = form_urlencoded::Serializer::new(String::new());
    query.append_pair("container", name).append_pair("stdout", "true").append_pair("stderr", "true");
    query.extend_pairs(command.iter().map(|word| ("command", word)));
    format!("/api/v1/namespaces/{namespace}/pods/{pod}/exec?{}", query.finish())
}

/// Output of a command that is read while the command runs.
pub(crate) struct Lines {
    messages: Messages,
    buffer: LineBuffer,
    stderr: Vec<u8>,
}

impl Lines {
    /// Returns the next line, or `None` at the end of the command.
    pub(crate) async fn next(&mut self) -> Result<Option<String>, ApiError> {
        loop {
            if let Some(line) = self.buffer.take() {
                return Ok(Some(line));
            }
            match self.messages.next().await.transpose()? {
                Some((STDOUT, data)) => self.buffer.add(&data),
                Some((STDERR, data)) => {
                    self.stderr.extend(data);
                    self.stderr.truncate(MAX_STDERR);
                }
                Some((STATUS, data)) => {
                    let exit_code = exit_code(&data)?;
                    if exit_code == 0 {
                        return Ok(None);
                    }
                    let stderr = std::mem::take(&mut self.stderr);
                    let output = Output { stderr, exit_code, ..Output::default() };
                    return Err(ApiError::Exec { message: output.last_error() });
                }
                Some(_) => {}
                None => return Err(ApiError::ConnectionClosed),
            }
        }
    }
}

/// Splits a stream of bytes into lines of at most [`MAX_LINE`] bytes.
#[derive(Debug, Default)]
struct LineBuffer {
    complete: VecDeque<String>,
    partial: Vec<u8>,
}

impl LineBuffer {
    fn add(&mut self, data: &[u8]) {
        let mut parts = data.split(|&byte| byte == b'\n');
        let last = parts.next_back().unwrap_or_default();
        for part in parts {
            self.extend(part);
            let line = std::mem::take(&mut self.partial);
            self.complete.push_back(String::from_utf8_lossy(&line).into_owned());
        }
        self.extend(last);
    }

    fn extend(&mut self, part: &[u8]) {
        let room = MAX_LINE.saturating_sub(self.partial.len());
        self.partial.extend(part.iter().take(room));
    }

    fn take(&mut self) -> Option<String> {
        self.complete.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_gives_the_exit_code() {
        assert_eq!(exit_code(br#"{"status":"Success"}"#).unwrap(), 0);
        let failure = br#"{"status":"Failure","reason":"NonZeroExitCode","message":"exit code 3",
            "details":{"causes":[{"reason":"ExitCode","message":"3"}]}}"#;
        assert_eq!(exit_code(failure).unwrap(), 3);
        let missing = br#"{"status":"Failure","reason":"InternalError","message":"no such file\u001b[2J"}"#;
        assert_eq!(exit_code(missing).unwrap_err().to_string(), r"no such file\u{1b}[2J");
        assert!(exit_code(b"x").is_err());
    }

    #[test]
    fn lines_are_split_and_cut() {
        let mut buffer = LineBuffer::default();
        buffer.add(b"one\ntw");
        assert_eq!((buffer.take().as_deref(), buffer.take()), (Some("one"), None));
        buffer.add(b"o\n\n");
        assert_eq!((buffer.take().as_deref(), buffer.take().as_deref()), (Some("two"), Some("")));
        buffer.add(&vec![b'x'; 3 * MAX_LINE]);
        buffer.add(b"\nnext\n");
        assert_eq!(buffer.take().unwrap().len(), MAX_LINE);
        assert_eq!(buffer.take().as_deref(), Some("next"));
    }
}
