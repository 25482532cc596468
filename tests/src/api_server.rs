//! A small Kubernetes API server: lists and watches pods over HTTP, and misbehaves on request.

use std::{
    collections::{BTreeMap, VecDeque},
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    path::Path,
    sync::{Arc, Condvar, Mutex, MutexGuard},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::Netns;

/// A server that runs until it is dropped.
#[derive(Debug)]
pub struct ApiServer {
    shared: Arc<Shared>,
    address: SocketAddr,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    store: Mutex<Store>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Store {
    version: u64,
    /// Oldest resource version that a watch can start from.
    oldest: u64,
    pods: BTreeMap<String, Value>,
    /// Taints of nodes, by node name.
    taints: BTreeMap<String, Value>,
    history: Vec<(u64, &'static str, Value)>,
    faults: VecDeque<Fault>,
    requests: Vec<String>,
    connections: Vec<TcpStream>,
    is_stopped: bool,
}

/// A failure that the server produces once.
#[derive(Clone, Debug)]
pub enum Fault {
    /// Answers the next list or watch with this status, these headers and this body.
    Answer(u16, &'static str, &'static str),
    /// Answers the next list or watch with a status object.
    Status(u16, &'static str),
    /// Leaves the next list or watch without a response.
    Silence,
    /// Closes the connection of the next list or watch without a response.
    Close,
    /// Closes the connection in the middle of the next list.
    HalfList,
    /// Closes the connection in the middle of the next event.
    HalfEvent,
    /// Begins the response to the next list with this text and never ends it.
    EndlessList(&'static str),
    /// Begins a line in the next watch and never ends it.
    EndlessLine,
    /// Sends this line in the next watch instead of events, and closes it properly.
    Line(&'static str),
}

impl ApiServer {
    /// Starts a server on a free port of loopback in the calling thread's namespace.
    #[must_use]
    pub fn start() -> Self {
        Self::serve(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind the API server"))
    }

    /// Starts a server on a free port of loopback in this namespace.
    #[must_use]
    pub fn start_in(netns: &Netns) -> Self {
        let bind = || TcpListener::bind((Ipv4Addr::LOCALHOST, 0));
        Self::serve(netns.run(bind).expect("bind the API server"))
    }

    fn serve(listener: TcpListener) -> Self {
        let address = listener.local_addr().expect("the address of a listener");
        let store = Store { version: 1, ..Store::default() };
        let shared = Arc::new(Shared { store: Mutex::new(store), changed: Condvar::new() });
        let for_thread = Arc::clone(&shared);
        let thread = thread::spawn(move || {
            for stream in listener.incoming() {
                let mut store = for_thread.lock();
                if store.is_stopped {
                    break;
                }
                let Ok(stream) = stream else { continue };
                store.connections.push(stream.try_clone().expect("a second descriptor"));
                drop(store);
                let shared = Arc::clone(&for_thread);
                thread::spawn(move || {
                    shared.serve(&stream);
                    // The thread that serves the connection has another descriptor.
                    let _ = stream.shutdown(Shutdown::Both);
                });
            }
        });
        Self { shared, address, thread: Some(thread) }
    }

    /// Returns the base URL of the server.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Writes a kubeconfig that points to the server.
    pub fn write_kubeconfig(&self, path: &Path) {
        write_kubeconfig(path, &self.url());
    }

    /// Stores a pod, built by [`pod`], and notifies the watches.
    pub fn apply(&self, mut pod: Value) {
        let mut store = self.shared.lock();
        let version = store.next_version();
        pod["metadata"]["resourceVersion"] = version.to_string().into();
        let uid = pod["metadata"]["uid"].as_str().expect("a uid").to_owned();
        let kind = if store.pods.insert(uid, pod.clone()).is_some() { "MODIFIED" } else { "ADDED" };
        store.history.push((version, kind, pod));
        self.shared.changed.notify_all();
    }

    /// Deletes the pod and notifies the watches.
    pub fn delete(&self, uid: &str) {
        let mut store = self.shared.lock();
        let version = store.next_version();
        let mut pod = store.pods.remove(uid).expect("a pod that was stored");
        pod["metadata"]["resourceVersion"] = version.to_string().into();
        store.history.push((version, "DELETED", pod));
        self.shared.changed.notify_all();
    }

    /// Deletes the pod and its history: only a list shows the deletion.
    pub fn forget(&self, uid: &str) {
        let mut store = self.shared.lock();
        store.pods.remove(uid).expect("a pod that was stored");
        store.compact();
    }

    /// Sends the current resource version to the watches as a bookmark.
    pub fn bookmark(&self) {
        let mut store = self.shared.lock();
        let version = store.next_version();
        let object = json!({ "kind": "Pod", "metadata": { "resourceVersion": version.to_string() } });
        store.history.push((version, "BOOKMARK", object));
        self.shared.changed.notify_all();
    }

    /// Discards the history, so that no watch can resume from an earlier version.
    pub fn compact(&self) {
        self.shared.lock().compact();
    }

    /// Queues a failure. Each failure applies to the next request of its kind; later ones wait for earlier ones.
    pub fn fail(&self, fault: Fault) {
        self.shared.lock().faults.push_back(fault);
        self.shared.changed.notify_all();
    }

    /// Returns the number of queued failures.
    #[must_use]
    pub fn faults_left(&self) -> usize {
        self.shared.lock().faults.len()
    }

    /// Sets the taints of a node, which exists from then on.
    pub fn set_taints(&self, node: &str, taints: Value) {
        self.shared.lock().taints.insert(node.to_owned(), taints);
    }

    /// Returns the taints of the node.
    #[must_use]
    pub fn taints(&self, node: &str) -> Value {
        self.shared.lock().taints[node].clone()
    }

    /// Closes all connections of clients.
    pub fn disconnect(&self) {
        for connection in self.shared.lock().connections.drain(..) {
            // The connection may be closed already.
            let _ = connection.shutdown(Shutdown::Both);
        }
    }

    /// Returns the targets of all requests so far.
    #[must_use]
    pub fn requests(&self) -> Vec<String> {
        self.shared.lock().requests.clone()
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.shared.lock().is_stopped = true;
        self.shared.changed.notify_all();
        self.disconnect();
        // A last connection wakes the accepting thread, if this thread can connect.
        let reached = TcpStream::connect(self.address).is_ok();
        if let Some(thread) = self.thread.take()
            && reached
        {
            let _ = thread.join();
        }
    }
}

/// Returns a pod object of the Kubernetes API.
#[must_use]
pub fn pod(uid: &str, node: &str, namespace: &str, service_account: &str, labels: &[(&str, &str)]) -> Value {
    let labels: BTreeMap<_, _> = labels.iter().copied().collect();
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": { "uid": uid, "namespace": namespace, "name": format!("pod-{uid}"), "labels": labels },
        "spec": { "nodeName": node, "serviceAccountName": service_account },
        "status": { "phase": "Running" },
    })
}

/// Writes a kubeconfig for a cluster at `url`.
pub fn write_kubeconfig(path: &Path, url: &str) {
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{ "name": "c", "cluster": { "server": url, "insecure-skip-tls-verify": true } }],
        "users": [{ "name": "u", "user": { "token": "secret" } }],
        "contexts": [{ "name": "x", "context": { "cluster": "c", "user": "u" } }],
        "current-context": "x",
    });
    // JSON is also valid YAML.
    std::fs::write(path, config.to_string()).expect("write a kubeconfig");
}

impl Store {
    fn next_version(&mut self) -> u64 {
        self.version += 1;
        self.version
    }

    fn compact(&mut self) {
        self.history.clear();
        self.oldest = self.next_version();
    }

    /// Takes the next failure from the queue if it applies to this request.
    fn take_fault(&mut self, is_watch: bool) -> Option<Fault> {
        let fits = match self.faults.front()? {
            Fault::Answer(..) | Fault::Status(..) | Fault::Silence | Fault::Close => true,
            Fault::HalfList | Fault::EndlessList(_) => !is_watch,
            Fault::HalfEvent | Fault::EndlessLine | Fault::Line(_) => is_watch,
        };
        if fits { self.faults.pop_front() } else { None }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Store> {
        self.store.lock().expect("no thread panics while it holds the store")
    }

    /// Answers one request. Returns early if the client closes the connection.
    fn serve(&self, mut stream: &TcpStream) -> Option<()> {
        let mut reader = BufReader::new(stream);
        let mut lines = reader.by_ref().lines();
        let request = lines.next()?.ok()?;
        let headers: Vec<_> = lines.map_while(Result::ok).take_while(|line| !line.is_empty()).collect();
        let target = request.split(' ').nth(1)?.to_owned();
        let is_known =
            headers.iter().any(|header| header.eq_ignore_ascii_case("authorization: Bearer secret"));
        let query = query(&target);
        let is_watch = query.contains_key("watch");
        let fault = {
            let mut store = self.lock();
            store.requests.push(target.clone());
            store.take_fault(is_watch)
        };
        match fault {
            Some(Fault::Answer(code, headers, body)) => return respond(stream, code, headers, body),
            Some(Fault::Status(code, message)) => return respond_status(stream, code, message),
            Some(Fault::Silence) => return self.wait_for_stop(),
            Some(Fault::Close) => return None,
            Some(Fault::HalfList) => {
                let list = self.list(&query).ok()?.to_string();
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
        if let Some(node) = target.strip_prefix("/api/v1/nodes/") {
            let length = headers.iter().find_map(|header| {
                let (name, value) = header.split_once(": ")?;
                name.eq_ignore_ascii_case("content-length").then(|| value.parse().ok())?
            });
            let mut patch = vec![0; length.unwrap_or_default()];
            reader.read_exact(&mut patch).ok()?;
            return self.node(stream, node, &patch);
        }
        if !target.starts_with("/api/v1/pods?") {
            return respond_status(stream, 404, "the server could not find the requested resource");
        }
        if is_watch {
            return self.watch(stream, &query);
        }
        match self.list(&query) {
            Ok(list) => respond(stream, 200, "Content-Type: application/json\r\n", &list.to_string()),
            Err(message) => respond_status(stream, 410, message),
        }
    }

    /// Returns a node object. A patch first tests the node's taints and replaces them.
    fn node(&self, stream: &TcpStream, node: &str, patch: &[u8]) -> Option<()> {
        let mut store = self.lock();
        let Some(taints) = store.taints.get_mut(node) else {
            return respond_status(stream, 404, "nodes not found");
        };
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
        let object = json!({ "kind": "Node", "metadata": { "name": node }, "spec": { "taints": taints } });
        drop(store);
        respond(stream, 200, "Content-Type: application/json\r\n", &object.to_string())
    }

    fn wait_for_stop(&self) -> Option<()> {
        let store = self.lock();
        drop(self.changed.wait_while(store, |store| !store.is_stopped).ok()?);
        Some(())
    }

    fn list(&self, query: &BTreeMap<String, String>) -> Result<Value, &'static str> {
        let store = self.lock();
        let version = query.get("resourceVersion").and_then(|version| version.parse::<u64>().ok());
        if version.is_some_and(|version| version > store.version) {
            return Err("Too large resource version");
        }
        let pods = store.pods.values().filter(|pod| is_selected(pod, query));
        let start: usize = query.get("continue").and_then(|start| start.parse().ok()).unwrap_or_default();
        let limit: usize = query.get("limit").and_then(|limit| limit.parse().ok()).unwrap_or(usize::MAX);
        let items: Vec<_> = pods.clone().skip(start).take(limit).cloned().collect();
        let end = start + items.len();
        let next = if end < pods.count() { end.to_string() } else { String::new() };
        Ok(json!({
            "kind": "PodList",
            "apiVersion": "v1",
            "metadata": { "resourceVersion": store.version.to_string(), "continue": next },
            "items": items,
        }))
    }

    fn watch(&self, mut stream: &TcpStream, query: &BTreeMap<String, String>) -> Option<()> {
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
            let news: Vec<_> = store.history.iter().filter(|(at, ..)| *at > version).cloned().collect();
            if news.is_empty() {
                store = self.changed.wait_timeout(store, left).ok()?.0;
                drop(store);
                continue;
            }
            drop(store);
            for (at, kind, object) in news {
                version = at;
                if kind == "BOOKMARK" || is_selected(&object, query) {
                    let line = format!("{}\n", json!({ "type": kind, "object": object }));
                    stream.write_all(format!("{:x}\r\n{line}\r\n", line.len()).as_bytes()).ok()?;
                }
            }
        }
    }
}

fn is_selected(pod: &Value, query: &BTreeMap<String, String>) -> bool {
    let node = query.get("fieldSelector").and_then(|selector| selector.strip_prefix("spec.nodeName="));
    node.is_none_or(|node| pod["spec"]["nodeName"] == node)
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

fn respond(mut stream: &TcpStream, code: u16, headers: &str, body: &str) -> Option<()> {
    let length = body.len();
    let head =
        format!("HTTP/1.1 {code} Status\r\nContent-Length: {length}\r\nConnection: close\r\n{headers}\r\n");
    stream.write_all((head + body).as_bytes()).ok()
}

fn respond_status(stream: &TcpStream, code: u16, message: &str) -> Option<()> {
    let status = json!({ "kind": "Status", "apiVersion": "v1", "code": code, "message": message });
    respond(stream, code, "Content-Type: application/json\r\n", &status.to_string())
}
