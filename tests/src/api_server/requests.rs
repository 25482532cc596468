//! Requests to the API server: lists, watches, and patches of nodes.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use super::{Fault, Shared};

impl Shared {
    /// Answers one request. Returns early if the client closes the connection.
    pub(super) fn serve(&self, mut stream: &TcpStream) -> Option<()> {
        let mut reader = BufReader::new(stream);
        let mut lines = reader.by_ref().lines();
        let request = lines.next()?.ok()?;
        let headers: Vec<_> = lines.map_while(Result::ok).take_while(|line| !line.is_empty()).collect();
        let target = request.split(' ').nth(1)?.to_owned();
        let authorization = format!("authorization: Bearer {}", self.lock().token());
        let is_known = headers.iter().any(|header| header.eq_ignore_ascii_case(&authorization));
        let query = query(&target);
        let is_watch = query.contains_key("watch");
        let fault = {
            let mut store = self.lock();
            store.requests.push(target.clone());
            store.headers.push(headers.clone());
            store.take_fault(is_watch)
        };
        match fault {
            Some(Fault::Answer(code, headers, body)) => return respond(stream, code, headers, body),
            Some(Fault::Status(code, message)) => return respond_status(stream, code, message),
            Some(Fault::Silence) => return self.wait_for_stop(),
            Some(Fault::Close) => return None,
            Some(Fault::HalfList) => {
                let list = self.list(kind(&target)?, &query).ok()?.to_string();
                let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", list.len());
                return stream.write_all((head + &list[..list.len() / 2]).as_bytes()).ok();
            }
            Some(Fault::EndlessList(start)) => return pour(stream, start),
            Some(Fault::EndlessLine) => return pour(stream, "{\"type\":\""),
            Some(Fault::Line(line)) => {
                stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n").ok()?;
                return stream.write_all(format!("{line}\n").as_bytes()).ok();
            }
            Some(Fault::HalfEvent) => {
                stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n").ok()?;
                return stream.write_all(b"{\"type\":\"ADDED\",\"object\":{\"metadata\":{\"uid\":\"h").ok();
            }
            None => {}
        }
        if !is_known {
            return respond_status(stream, 401, "Unauthorized");
        }
        if self.lock().forbidden.iter().any(|prefix| target.starts_with(prefix)) {
            return respond_status(stream, 403, "forbidden: the service account has no such role");
        }
        let length = headers.iter().find_map(|header| {
            let (name, value) = header.split_once(": ")?;
            name.eq_ignore_ascii_case("content-length").then(|| value.parse().ok())?
        });
        let mut body = vec![0; length.unwrap_or_default()];
        reader.read_exact(&mut body).ok()?;
        if let Some(below) = target.strip_prefix("/apis/events.k8s.io/v1/namespaces/") {
            let (namespace, name) = below.split_once("/events")?;
            return self.event(stream, namespace, name.trim_start_matches('/'), &body);
        }
        if let Some(node) = target.strip_prefix("/api/v1/nodes/") {
            return match node.strip_suffix("/status") {
                Some(node) => self.node_status(stream, node, &body),
                None => self.node(stream, node, &body),
            };
        }
        if let Some(answer) = self.fleet_answer(&target) {
            return self.send_fleet_answer(stream, answer, &headers);
        }
        let Some(kind) = kind(&target) else {
            return respond_status(stream, 404, "the server could not find the requested resource");
        };
        if is_watch {
            return self.watch(stream, kind, &query);
        }
        match self.list(kind, &query) {
            Ok(list) => respond(stream, 200, "Content-Type: application/json\r\n", &list.to_string()),
            Err(message) => respond_status(stream, 410, message),
        }
    }

    /// Returns a node object. A patch first tests the node's taints and replaces them.
    fn node(&self, stream: &TcpStream, node: &str, patch: &[u8]) -> Option<()> {
        let mut store = self.lock();
        let labels = store.labels.get(node).cloned();
        let taints = store.taints.get_mut(node);
        if labels.is_none() && taints.is_none() {
            return respond_status(stream, 404, "nodes not found");
        }
        let mut no_taints = json!([]);
        let taints = taints.unwrap_or(&mut no_taints);
        if !patch.is_empty() {
            let patch: Value = serde_json::from_slice(patch).ok()?;
            if patch[0]["op"] != "test" || patch[0]["value"] != *taints {
                return respond_status(
                    stream,
                    422,
                    "the server rejected our request due to an error in our request",
                );
            }
            *taints = patch[1]["value"].clone();
        }
        let metadata = json!({ "name": node, "labels": labels });
        let object = json!({ "kind": "Node", "metadata": metadata, "spec": { "taints": taints } });
        drop(store);
        respond(stream, 200, "Content-Type: application/json\r\n", &object.to_string())
    }

    pub(super) fn wait_for_stop(&self) -> Option<()> {
        let store = self.lock();
        drop(self.changed.wait_while(store, |store| !store.is_stopped).ok()?);
        Some(())
    }

    fn list(&self, kind: &str, query: &BTreeMap<String, String>) -> Result<Value, &'static str> {
        let store = self.lock();
        let version = query.get("resourceVersion").and_then(|version| version.parse::<u64>().ok());
        if version.is_some_and(|version| version > store.version) {
            return Err("Too large resource version");
        }
        let objects = store.objects.values().filter(|object| is_selected(object, kind, query));
        let start: usize = query.get("continue").and_then(|start| start.parse().ok()).unwrap_or_default();
        let limit: usize = query.get("limit").and_then(|limit| limit.parse().ok()).unwrap_or(usize::MAX);
        let items: Vec<_> = objects.clone().skip(start).take(limit).cloned().collect();
        let end = start + items.len();
        let next = if end < objects.count() { end.to_string() } else { String::new() };
        Ok(json!({
            "kind": format!("{kind}List"),
            "apiVersion": "v1",
            "metadata": { "resourceVersion": store.version.to_string(), "continue": next },
            "items": items,
        }))
    }

    fn watch(&self, mut stream: &TcpStream, of: &str, query: &BTreeMap<String, String>) -> Option<()> {
        let mut version: u64 = query.get("resourceVersion")?.parse().ok()?;
        let timeout: u64 = query.get("timeoutSeconds")?.parse().ok()?;
        let end = Instant::now() + Duration::from_secs(timeout);
        if version < self.lock().oldest {
            return respond_status(stream, 410, "too old resource version");
        }
        stream
            .write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n")
            .ok()?;
        loop {
            let mut store = self.lock();
            if store.is_stopped {
                return None;
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                // The next watch resumes where this one ends.
                drop(store);
                return stream.write_all(b"0\r\n\r\n").ok();
            }
            let events: Vec<_> = store.history.iter().filter(|(at, ..)| *at > version).cloned().collect();
            if events.is_empty() {
                store = self.changed.wait_timeout(store, left).ok()?.0;
                drop(store);
                continue;
            }
            drop(store);
            for (at, kind, object) in events {
                version = at;
                if kind == "BOOKMARK" || is_selected(&object, of, query) {
                    let line = format!("{}\n", json!({ "type": kind, "object": object }));
                    stream.write_all(format!("{:x}\r\n{line}\r\n", line.len()).as_bytes()).ok()?;
                }
            }
        }
    }
}

/// Returns the kind of the objects at a target.
fn kind(target: &str) -> Option<&'static str> {
    match target.split_once('?')?.0 {
        "/api/v1/pods" => Some("Pod"),
        "/api/v1/namespaces" => Some("Namespace"),
        _ => None,
    }
}

fn is_selected(object: &Value, kind: &str, query: &BTreeMap<String, String>) -> bool {
    let node = query.get("fieldSelector").and_then(|selector| selector.strip_prefix("spec.nodeName="));
    object["kind"] == kind && node.is_none_or(|node| object["spec"]["nodeName"] == node)
}

/// Returns the query parameters of a target. Decodes only escapes that occur in names and numbers.
fn query(target: &str) -> BTreeMap<String, String> {
    let (_, query) = target.split_once('?').unwrap_or_default();
    let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
    pairs.map(|(key, value)| (key.to_owned(), value.replace("%3D", "="))).collect()
}

/// Sends data until the client closes the connection.
fn pour(mut stream: &TcpStream, start: &str) -> Option<()> {
    stream.write_all(format!("HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{start}").as_bytes()).ok()?;
    let more = " ".repeat(1 << 16);
    while stream.write_all(more.as_bytes()).is_ok() {}
    None
}

pub(super) fn respond(mut stream: &TcpStream, code: u16, headers: &str, body: &str) -> Option<()> {
    let length = body.len();
    let head =
        format!("HTTP/1.1 {code} Status\r\nContent-Length: {length}\r\nConnection: close\r\n{headers}\r\n");
    stream.write_all((head + body).as_bytes()).ok()
}

pub(super) fn respond_status(stream: &TcpStream, code: u16, message: &str) -> Option<()> {
    let status = json!({ "kind": "Status", "apiVersion": "v1", "code": code, "message": message });
    respond(stream, code, "Content-Type: application/json\r\n", &status.to_string())
}
