//! Agents of a cluster: paged lists with selectors, commands in pods over a WebSocket, and the proxy to metrics.

use std::{
    collections::BTreeMap,
    fmt,
    io::{Read as _, Write as _},
    net::TcpStream,
    process::{Command, Stdio},
    sync::Arc,
};

use serde_json::{Value, json};
use tungstenite::{
    Message, WebSocket,
    handshake::derive_accept_key,
    protocol::{CloseFrame, Role, frame::coding::CloseCode},
};

use super::{
    ApiServer, Shared,
    requests::{respond, respond_status},
};

const JSON: &str = "Content-Type: application/json\r\n";
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const STATUS: u8 = 3;

/// Objects and answers of the fleet.
#[derive(Debug, Default)]
pub(super) struct Fleet {
    /// Objects of each list, by its path.
    lists: BTreeMap<String, Vec<Value>>,
    exec: BTreeMap<String, Exec>,
    metrics: BTreeMap<String, String>,
}

/// Output of a command.
#[derive(Clone, Debug, Default)]
pub struct ExecOutput {
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// Exit code.
    pub code: i32,
}

/// Function of the words of a command.
type Respond<T> = dyn Fn(&[String]) -> T + Send + Sync;

/// Behaviour of a pod when a command is run in it.
#[derive(Clone)]
pub enum Exec {
    /// Returns the output of the command, whose words are the argument.
    Answer(Arc<Respond<ExecOutput>>),
    /// Runs this process instead of the command, and forwards its output as it arrives.
    Run(Arc<Respond<Command>>),
    /// Starts the command and sends nothing.
    Silent,
    /// Closes the connection after this output.
    Close(&'static str),
    /// Sends output without end.
    Endless,
}

impl fmt::Debug for Exec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Exec")
    }
}

impl Exec {
    /// Returns an output for each command that starts with a text, and an error for all others.
    #[must_use]
    pub fn table(outputs: &[(&'static str, &str, i32)]) -> Self {
        let outputs: Vec<_> =
            outputs.iter().map(|&(command, stdout, code)| (command, stdout.to_owned(), code)).collect();
        Self::Answer(Arc::new(move |command| {
            let command = command.join(" ");
            let found = outputs.iter().find(|(start, ..)| command.starts_with(start));
            let (stdout, stderr, code) = found.map_or_else(
                || (String::new(), format!("no answer to {command}"), 1),
                |(_, stdout, code)| (stdout.clone(), String::new(), *code),
            );
            ExecOutput { stdout, stderr, code }
        }))
    }
}

/// Returns a running pod of the agent on a node. The UID is equal to the name.
#[must_use]
pub fn agent_pod(name: &str, node: &str) -> Value {
    json!({
        "metadata": {
            "name": name, "namespace": "imds-agent", "uid": name, "creationTimestamp": "2026-11-23T15:04:05Z",
            "labels": { "app.kubernetes.io/name": "imds-agent" },
        },
        "spec": { "nodeName": node },
        "status": { "phase": "Running", "containerStatuses": [{ "name": "imds-agent", "state": { "running": {} } }] },
    })
}

/// Returns a node with a label `pool`.
#[must_use]
pub fn node(name: &str, pool: &str) -> Value {
    json!({ "metadata": { "name": name, "labels": { "kubernetes.io/os": "linux", "pool": pool } } })
}

impl ApiServer {
    /// Sets the objects of the list at a path, such as `/api/v1/nodes`.
    pub fn set_list(&self, path: &str, objects: Vec<Value>) {
        self.shared.lock().fleet.lists.insert(path.to_owned(), objects);
    }

    /// Sets the pods of the agent.
    pub fn set_agent_pods(&self, pods: Vec<Value>) {
        self.set_list("/api/v1/namespaces/imds-agent/pods", pods);
    }

    /// Sets the behaviour of a pod when a command is run in it.
    pub fn on_exec(&self, pod: &str, exec: Exec) {
        self.shared.lock().fleet.exec.insert(pod.to_owned(), exec);
    }

    /// Sets the metrics that a pod serves.
    pub fn set_metrics(&self, pod: &str, text: &str) {
        self.shared.lock().fleet.metrics.insert(pod.to_owned(), text.to_owned());
    }
}

/// Answer to a request that is about the fleet.
pub(super) enum FleetAnswer {
    Object(Value),
    Text(String),
    Status(u16, &'static str),
    Exec(Exec, Vec<String>),
}

impl Shared {
    /// Returns the answer to a request, or `None` if it is about nothing of the fleet.
    pub(super) fn fleet_answer(&self, target: &str) -> Option<FleetAnswer> {
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let query: Vec<_> = query.split('&').filter_map(|pair| pair.split_once('=')).collect();
        let value = |name: &str| {
            query.iter().find(|(key, _)| *key == name).map(|(_, value)| decoded(value)).unwrap_or_default()
        };
        let store = self.lock();
        if let Some(objects) = store.fleet.lists.get(path) {
            let selector = value("labelSelector");
            let selected: Vec<_> =
                objects.iter().filter(|object| matches_labels(object, &selector)).cloned().collect();
            let start = value("continue").parse().unwrap_or(0_usize).min(selected.len());
            let limit: usize = value("limit").parse().unwrap_or(usize::MAX);
            let end = start.saturating_add(limit).min(selected.len());
            let next = if end < selected.len() { end.to_string() } else { String::new() };
            return Some(FleetAnswer::Object(json!({
                "metadata": { "continue": next }, "items": selected[start..end],
            })));
        }
        let (_, pod) = path.strip_prefix("/api/v1/namespaces/")?.split_once("/pods/")?;
        let (pod, resource) = pod.split_once('/')?;
        Some(match (pod.split_once(':'), resource) {
            (None, "exec") => match store.fleet.exec.get(pod) {
                Some(exec) => {
                    let words = query.iter().filter(|(key, _)| *key == "command");
                    let words = words.map(|(_, word)| decoded(word)).collect();
                    FleetAnswer::Exec(exec.clone(), words)
                }
                None => FleetAnswer::Status(404, "pods not found"),
            },
            (Some((pod, "9254")), "proxy/metrics") => match store.fleet.metrics.get(pod) {
                Some(text) => FleetAnswer::Text(text.clone()),
                None => FleetAnswer::Status(503, "error trying to reach service: connection refused"),
            },
            _ => FleetAnswer::Status(404, "the server could not find the requested resource"),
        })
    }

    /// Sends an answer of [`Shared::fleet_answer`].
    pub(super) fn send_fleet_answer(
        &self,
        mut stream: &TcpStream,
        answer: FleetAnswer,
        headers: &[String],
    ) -> Option<()> {
        match answer {
            FleetAnswer::Object(object) => respond(stream, 200, JSON, &object.to_string()),
            FleetAnswer::Text(text) => respond(stream, 200, "Content-Type: text/plain\r\n", &text),
            FleetAnswer::Status(code, message) => respond_status(stream, code, message),
            FleetAnswer::Exec(exec, command) => {
                let key = headers.iter().find_map(|header| {
                    let (name, value) = header.split_once(": ")?;
                    name.eq_ignore_ascii_case("sec-websocket-key").then_some(value)
                })?;
                let accept = derive_accept_key(key.as_bytes());
                let response = format!(
                    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
                     Sec-WebSocket-Protocol: v5.channel.k8s.io\r\nSec-WebSocket-Accept: {accept}\r\n\r\n"
                );
                stream.write_all(response.as_bytes()).ok()?;
                let mut socket = WebSocket::from_raw_socket(stream, Role::Server, None);
                self.run(&mut socket, exec, &command)
            }
        }
    }

    fn run(&self, socket: &mut WebSocket<&TcpStream>, exec: Exec, command: &[String]) -> Option<()> {
        let code = match exec {
            Exec::Answer(answer) => {
                let ExecOutput { stdout, stderr, code } = answer(command);
                // A message of the kubelet has at most 32 KiB.
                for part in stdout.as_bytes().chunks(32 << 10) {
                    send(socket, STDOUT, part)?;
                }
                send(socket, STDERR, stderr.as_bytes())?;
                code
            }
            Exec::Run(process) => forward(socket, process(command))?,
            Exec::Silent => return self.wait_for_stop(),
            Exec::Close(output) => return send(socket, STDOUT, output.as_bytes()),
            Exec::Endless => {
                let spaces = vec![b' '; 1 << 15];
                while send(socket, STDOUT, &spaces).is_some() {}
                return None;
            }
        };
        let cause = json!({ "reason": "ExitCode", "message": code.to_string() });
        let status = if code == 0 {
            json!({ "status": "Success" })
        } else {
            json!({
                "status": "Failure", "reason": "NonZeroExitCode", "message": format!("exit code {code}"),
                "details": { "causes": [cause] },
            })
        };
        send(socket, STATUS, status.to_string().as_bytes())?;
        socket.close(Some(CloseFrame { code: CloseCode::Normal, reason: "".into() })).ok()?;
        socket.flush().ok()
    }
}

/// Runs a process and forwards its standard output. Returns its exit code.
fn forward(socket: &mut WebSocket<&TcpStream>, mut command: Command) -> Option<i32> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("start a command");
    let mut stdout = child.stdout.take().expect("a pipe");
    let mut part = vec![0; 1 << 15];
    loop {
        match stdout.read(&mut part) {
            Ok(0) | Err(_) => break,
            Ok(length) => {
                if send(socket, STDOUT, &part[..length]).is_none() {
                    // The client has closed the connection.
                    let _ = child.kill();
                    let _ = child.wait();
                    return None;
                }
            }
        }
    }
    let output = child.wait_with_output().expect("wait for a command");
    send(socket, STDERR, &output.stderr)?;
    output.status.code()
}

fn send(socket: &mut WebSocket<&TcpStream>, channel: u8, data: &[u8]) -> Option<()> {
    let message = [&[channel], data].concat();
    socket.send(Message::binary(message)).ok()
}

/// Reports whether an object has all labels of a selector `a=b,c=d`.
fn matches_labels(object: &Value, selector: &str) -> bool {
    let mut terms = selector.split(',').filter(|term| !term.is_empty());
    terms.all(|term| {
        let (key, value) = term.split_once('=').unwrap_or((term, ""));
        object["metadata"]["labels"][key] == value
    })
}

/// Decodes a value of a query.
fn decoded(text: &str) -> String {
    let (mut bytes, mut rest) = (Vec::new(), text.bytes());
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => {
                let mut digit = || char::from(rest.next()?).to_digit(16);
                let number = digit().zip(digit()).map(|(high, low)| 16 * high + low);
                u8::try_from(number.unwrap_or_default()).unwrap_or_default()
            }
            other => other,
        });
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
