//! `kubectl imds events`: the events of all nodes as one stream.

use std::{
    collections::HashMap,
    io::{self, Write as _},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::Result;
use serde_json::{Map, Value};
use tokio::{
    sync::{Semaphore, mpsc},
    task::JoinSet,
    time::{Instant, sleep_until},
};

use super::output::{Format, errors_text, exit_code, write_stderr, write_stdout};
use crate::{
    api::{Api, ApiError, exec::Container},
    escape::{escape, to_json},
    fleet::{AskError, Fleet, Target},
};

/// Interval at which new pods are looked for.
const REFRESH: Duration = Duration::from_secs(30);
/// Delay before the next attempt on a node: doubles with each failure.
const MIN_DELAY: Duration = Duration::from_secs(1);
const MAX_DELAY: Duration = Duration::from_secs(30);
/// Lines that wait to be printed. Streams wait while the reader of the output is slow.
const QUEUE: usize = 1024;

/// Options of `imds-agent events`.
#[derive(Clone, Debug)]
pub(crate) struct EventOptions {
    pub(crate) format: Format,
    pub(crate) since: Option<String>,
    pub(crate) follow: bool,
}

impl EventOptions {
    fn command(&self) -> Vec<&str> {
        let mut command = vec!["events"];
        if self.format == Format::Json {
            command.extend(["-o", "json"]);
        }
        if let Some(since) = &self.since {
            command.extend(["--since", since]);
        }
        if !self.follow {
            command.push("--no-follow");
        }
        command
    }
}

/// Prints the events of all nodes.
pub(crate) async fn events(fleet: &Fleet, options: &EventOptions) -> Result<ExitCode> {
    for limitation in &fleet.limitations {
        write_stderr(limitation);
    }
    if options.follow { follow(fleet, options).await } else { recorded(fleet, options).await }
}

/// Prints the recorded events, node by node in the order of the answers.
async fn recorded(fleet: &Fleet, options: &EventOptions) -> Result<ExitCode> {
    let command = options.command();
    let mut written = Ok(());
    let errors = fleet
        .ask(
            async |target| {
                let output = fleet.run(target, &command).await?;
                if output.exit_code != 0 {
                    return Err(AskError::Failed { code: output.exit_code, error: output.last_error() });
                }
                Ok(String::from_utf8_lossy(&output.stdout).into_owned())
            },
            |target, text| {
                let lines: String =
                    text.lines().map(|line| format_line(options.format, &target.node, line) + "\n").collect();
                if written.is_ok() {
                    written = write_stdout(lines);
                }
            },
        )
        .await;
    written?;
    errors_text(&errors).lines().skip(2).for_each(|line| write_stderr(line.trim()));
    Ok(exit_code(errors.is_empty()))
}

/// Returns a line with its node.
fn format_line(format: Format, node: &str, line: &str) -> String {
    if format == Format::Table {
        return format!("{} {}", escape(node), escape(line));
    }
    let mut object = Map::from_iter([("node".to_owned(), Value::from(node))]);
    match serde_json::from_str(line) {
        Ok(Value::Object(event)) => object.extend(event.into_iter().filter(|(name, _)| name != "node")),
        _ => {
            object.insert("malformed".to_owned(), line.into());
        }
    }
    to_json(&object).unwrap_or_default()
}

/// State of a followed pod.
#[derive(Debug, Default)]
struct Followed {
    is_connected: bool,
    /// Time of the next attempt after a failure.
    retry_at: Option<Instant>,
    delay: Duration,
    last_error: String,
}

/// Message of a stream.
enum Message {
    Line(String),
    Connected(String),
}

/// Follows all nodes until the reader closes standard output. Pods that are new or replaced are followed as soon as a list
/// shows them.
async fn follow(fleet: &Fleet, options: &EventOptions) -> Result<ExitCode> {
    let (sender, mut messages) = mpsc::channel(QUEUE);
    let connecting = Arc::new(Semaphore::new(fleet.selection.parallel));
    let mut streams = JoinSet::new();
    let mut followed = HashMap::<String, Followed>::new();
    for error in &fleet.errors {
        write_stderr(&format!("{}: {}", error.node, error.error));
    }
    let mut targets = fleet.targets.clone();
    // Events that a replaced pod has not printed are unread, and the new pod prints them.
    let later = EventOptions { since: None, ..options.clone() };
    let mut options = options;
    loop {
        followed.retain(|uid, _| targets.iter().any(|target| target.uid == *uid));
        let now = Instant::now();
        for target in &targets {
            let state = followed.entry(target.uid.clone()).or_default();
            if !state.is_connected && state.retry_at.is_none_or(|at| at <= now) {
                state.is_connected = true;
                let stream = NodeStream {
                    api: fleet.api.clone(),
                    namespace: fleet.namespace.clone(),
                    container: fleet.selection.container.clone(),
                    target: target.clone(),
                    options: options.clone(),
                    sender: sender.clone(),
                };
                streams.spawn(stream.run(Arc::clone(&connecting)));
            }
        }
        options = &later;
        let mut next = now + REFRESH;
        loop {
            tokio::select! {
                message = messages.recv() => match message {
                    Some(Message::Line(line)) => {
                        if !write_line(&line)? {
                            return Ok(ExitCode::SUCCESS);
                        }
                    }
                    Some(Message::Connected(uid)) => {
                        if let Some(state) = followed.get_mut(&uid) {
                            *state = Followed { is_connected: true, ..Followed::default() };
                        }
                    }
                    None => return Ok(ExitCode::SUCCESS),
                },
                Some(ended) = streams.join_next() => {
                    let (target, error) = ended?;
                    if let Some(state) = followed.get_mut(&target.uid) {
                        let at = state.fail(&target.node, error.as_ref());
                        next = next.min(at);
                    }
                }
                () = sleep_until(next) => break,
            }
        }
        match fleet.rediscover().await {
            Ok(listed) => targets = listed,
            Err(error) => {
                write_stderr(&format!("failed to list the agents, keeping the known ones: {error:#}"));
            }
        }
    }
}

impl Followed {
    /// Records the end of a stream. Returns the time of the next attempt. Prints an error once, not with each attempt.
    fn fail(&mut self, node: &str, error: Option<&ApiError>) -> Instant {
        self.is_connected = false;
        self.delay = (self.delay * 2).clamp(MIN_DELAY, MAX_DELAY);
        let text = error.map_or_else(|| "the stream of events ended".to_owned(), ToString::to_string);
        if text != self.last_error {
            write_stderr(&format!("{node}: {text}; trying again"));
            self.last_error = text;
        }
        *self.retry_at.insert(Instant::now() + self.delay)
    }
}

/// Stream of one node.
struct NodeStream {
    api: Api,
    namespace: String,
    container: String,
    target: Target,
    options: EventOptions,
    sender: mpsc::Sender<Message>,
}

impl NodeStream {
    /// Runs until the stream ends. Returns its target and its error.
    async fn run(self, connecting: Arc<Semaphore>) -> (Target, Option<ApiError>) {
        let error = self.stream(&connecting).await.err();
        (self.target, error)
    }

    async fn stream(&self, connecting: &Semaphore) -> Result<(), ApiError> {
        let container =
            Container { namespace: &self.namespace, pod: &self.target.pod, name: &self.container };
        let permit = connecting.acquire().await;
        let mut lines =
            Box::pin(self.api.exec_lines(container, &Fleet::command(&self.options.command()))).await?;
        drop(permit);
        let uid = self.target.uid.clone();
        let mut is_sent = self.sender.send(Message::Connected(uid)).await.is_ok();
        while is_sent && let Some(line) = lines.next().await? {
            let line = format_line(self.options.format, &self.target.node, &line);
            is_sent = self.sender.send(Message::Line(line)).await.is_ok();
        }
        Ok(())
    }
}

/// Writes a line to standard output. Returns false if its reader has closed it.
fn write_line(line: &str) -> io::Result<bool> {
    let mut stdout = io::stdout().lock();
    match writeln!(stdout, "{line}").and_then(|()| stdout.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_name_their_node() {
        let line = "2026-11-23T15:04:05.123Z denied  socket      curl\x1b[2J";
        let expected = r"n1 2026-11-23T15:04:05.123Z denied  socket      curl\u{1b}[2J";
        assert_eq!(format_line(Format::Table, "n1", line), expected);
        let json = format_line(Format::Json, "n1", r#"{"time":"t","node":"forged","hook":"socket"}"#);
        assert_eq!(json, r#"{"node":"n1","time":"t","hook":"socket"}"#);
        let json = format_line(Format::Json, "n1", "no JSON");
        assert_eq!(json, r#"{"node":"n1","malformed":"no JSON"}"#);
    }

    #[test]
    fn options_are_passed_on() {
        let options = |format, since: Option<&str>, follow| EventOptions {
            format,
            since: since.map(str::to_owned),
            follow,
        };
        assert_eq!(options(Format::Table, None, true).command(), ["events"]);
        let command = ["events", "-o", "json", "--since", "10m", "--no-follow"];
        assert_eq!(options(Format::Json, Some("10m"), false).command(), command);
    }

    #[test]
    fn attempts_become_rarer() {
        let mut followed = Followed::default();
        let mut delays = Vec::new();
        for _ in 0..7 {
            followed.fail("n", None);
            delays.push(followed.delay.as_secs());
        }
        assert_eq!(delays, [1, 2, 4, 8, 16, 30, 30]);
    }
}
