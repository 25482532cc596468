//! A small Kubernetes API server: lists and watches pods and namespaces over HTTP, stores Events and conditions, and fails on
//! request.

mod fleet;
mod requests;
mod writes;

use std::{
    collections::{BTreeMap, VecDeque},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    path::Path,
    sync::{Arc, Condvar, Mutex, MutexGuard},
    thread::{self, JoinHandle},
    time::Instant,
};

use serde_json::{Value, json};

pub use self::fleet::{Exec, ExecOutput, agent_pod, node};
use crate::Netns;

/// Token that the server accepts at first.
const TOKEN: &str = "secret";

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
    /// Pods and namespaces by UID.
    objects: BTreeMap<String, Value>,
    /// Taints of nodes, by node name.
    taints: BTreeMap<String, Value>,
    /// Labels of nodes, by node name.
    labels: BTreeMap<String, Value>,
    /// Events by namespace and name.
    events: BTreeMap<(String, String), Value>,
    /// Times of the requests that created or patched an Event.
    event_writes: Vec<Instant>,
    /// Conditions of nodes by node name and type.
    conditions: BTreeMap<(String, String), Value>,
    /// Token of the client, if it is not [`TOKEN`].
    token: Option<&'static str>,
    /// Prefixes of targets that the client may not access.
    forbidden: Vec<&'static str>,
    lost_event_answers: usize,
    history: Vec<(u64, &'static str, Value)>,
    faults: VecDeque<Fault>,
    requests: Vec<String>,
    /// Agents of a cluster.
    fleet: fleet::Fleet,
    /// Header lines of each request.
    headers: Vec<Vec<String>>,
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
        write_config(path, &self.url(), self.shared.lock().token());
    }

    /// Accepts only this token from now on.
    pub fn set_token(&self, token: &'static str) {
        self.shared.lock().token = Some(token);
    }

    /// Stores an object, built by [`pod`] or [`namespace`], and notifies the watches.
    pub fn apply(&self, mut object: Value) {
        let mut store = self.shared.lock();
        let version = store.next_version();
        object["metadata"]["resourceVersion"] = version.to_string().into();
        let uid = object["metadata"]["uid"].as_str().expect("a uid").to_owned();
        let kind = if store.objects.insert(uid, object.clone()).is_some() { "MODIFIED" } else { "ADDED" };
        store.history.push((version, kind, object));
        self.shared.changed.notify_all();
    }

    /// Deletes the object and notifies the watches.
    pub fn delete(&self, uid: &str) {
        let mut store = self.shared.lock();
        let version = store.next_version();
        let mut object = store.objects.remove(uid).expect("an object that was stored");
        object["metadata"]["resourceVersion"] = version.to_string().into();
        store.history.push((version, "DELETED", object));
        self.shared.changed.notify_all();
    }

    /// Deletes the object and its history: only a list shows the deletion.
    pub fn forget(&self, uid: &str) {
        let mut store = self.shared.lock();
        store.objects.remove(uid).expect("an object that was stored");
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

    /// Sets the labels of a node, which exists from then on.
    pub fn set_labels(&self, node: &str, labels: Value) {
        self.shared.lock().labels.insert(node.to_owned(), labels);
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

    /// Returns the value of this header of each request so far; an empty string if a request does not have it.
    #[must_use]
    pub fn header_values(&self, name: &str) -> Vec<String> {
        let value = |line: &String| {
            let (other, value) = line.split_once(": ")?;
            other.eq_ignore_ascii_case(name).then(|| value.to_owned())
        };
        let store = self.shared.lock();
        store.headers.iter().map(|lines| lines.iter().find_map(value).unwrap_or_default()).collect()
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

/// Returns a namespace object of the Kubernetes API. The name is also the UID.
#[must_use]
pub fn namespace(name: &str, labels: &[(&str, &str)]) -> Value {
    let name_label = ("kubernetes.io/metadata.name", name);
    let labels: BTreeMap<_, _> = labels.iter().copied().chain([name_label]).collect();
    json!({
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": { "uid": name, "name": name, "labels": labels },
        "spec": { "finalizers": ["kubernetes"] },
        "status": { "phase": "Active" },
    })
}

/// Writes a kubeconfig for a cluster at `url`.
pub fn write_kubeconfig(path: &Path, url: &str) {
    write_config(path, url, TOKEN);
}

fn write_config(path: &Path, url: &str, token: &str) {
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{ "name": "c", "cluster": { "server": url, "insecure-skip-tls-verify": true } }],
        "users": [{ "name": "u", "user": { "token": token } }],
        "contexts": [{ "name": "x", "context": { "cluster": "c", "user": "u" } }],
        "current-context": "x",
    });
    // JSON is also valid YAML.
    std::fs::write(path, config.to_string()).expect("write a kubeconfig");
}

impl Store {
    fn token(&self) -> &'static str {
        self.token.unwrap_or(TOKEN)
    }

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
}
