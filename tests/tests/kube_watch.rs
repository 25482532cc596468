//! The watch of the API server over HTTP, and the effect of its failures on exemptions.

use std::{path::Path, time::Duration};

use imds_agent::{
    config::{Access, Config, PodSelector, RuleSubject, provider::Dmi},
    kube::{Backoff, ErrorKind, Index, Options, PodEvent, PodWatcher, WatchState},
};
use imds_tests::api_server::{ApiServer, Fault, pod, write_kubeconfig};
use tempfile::TempDir;
use tokio::time::timeout;

const LONG: Duration = Duration::from_secs(20);
const NODE: &str = "node-0";
const RULES: &str = "
    [[exempt]]
    name = 'trusted'
    namespace = 'kube-system'
    pod_selector = { match_labels = { app = 'x' } }";

/// A watch whose events update an index.
struct Follower {
    watch: PodWatcher,
    index: Index,
    rule: PodSelector,
    /// Number of pods in each relist.
    relists: Vec<usize>,
    directory: TempDir,
}

impl Follower {
    fn new(server: &ApiServer) -> Self {
        Self::with(server, |_| ())
    }

    fn with(server: &ApiServer, change: impl FnOnce(&mut Options)) -> Self {
        let directory = TempDir::new().unwrap();
        let kubeconfig = directory.path().join("kubeconfig");
        server.write_kubeconfig(&kubeconfig);
        let mut options = fast_retries();
        change(&mut options);
        let config = Config::parse(RULES, Path::new("imds.toml")).unwrap();
        let RuleSubject::Pods(rule) = config.resolve(&Dmi::default()).unwrap().1.remove(0).sender else {
            panic!("a rule for pods")
        };
        Self {
            watch: PodWatcher::start(Access::Kubeconfig(kubeconfig), NODE.to_owned(), options),
            index: Index::default(),
            rule,
            relists: Vec::new(),
            directory,
        }
    }

    /// Applies events until `is_so` returns true.
    async fn until(&mut self, what: &str, is_so: impl Fn(&Self) -> bool) {
        let waiting = async {
            while !is_so(self) {
                let event = self.watch.next().await.expect("the watch must continue");
                if let PodEvent::Relist(pods) = &event {
                    self.relists.push(pods.len());
                }
                self.index.handle(event);
            }
        };
        timeout(LONG, waiting).await.unwrap_or_else(|_| panic!("timed out waiting for {what}"));
    }

    async fn until_state(&mut self, what: &str, is_so: impl FnMut(&WatchState) -> bool) {
        let mut state = self.watch.state();
        let so = timeout(LONG, state.wait_for(is_so)).await;
        so.unwrap_or_else(|_| panic!("timed out waiting for {what}")).expect("the watch must continue");
    }

    fn is_exempt(&self, uid: &str) -> bool {
        self.index.matching(&self.rule).any(|pod| pod.uid == uid)
    }

    fn errors(&self, kind: ErrorKind) -> u64 {
        self.watch.state().borrow().errors.get(&kind).copied().unwrap_or_default()
    }
}

fn fast_retries() -> Options {
    let backoff = Backoff::new(Duration::from_millis(20), Duration::from_millis(200));
    Options { backoff, ..Options::default() }
}

fn trusted(uid: &str) -> serde_json::Value {
    pod(uid, NODE, "kube-system", "s", &[("app", "x")])
}

/// Returns a server with one trusted pod, and a follower that has listed it and watches for changes.
async fn followed() -> (ApiServer, Follower) {
    let server = ApiServer::start();
    server.apply(trusted("a"));
    let mut follower = Follower::new(&server);
    follower.until("the first list", |follower| follower.is_exempt("a")).await;
    follower.until_state("a watch", |state| state.connected).await;
    (server, follower)
}

#[tokio::test(flavor = "current_thread")]
async fn pods_are_added_changed_and_deleted() {
    let (server, mut follower) = followed().await;
    server.apply(trusted("b"));
    server.apply(pod("c", NODE, "default", "s", &[("app", "x")]));
    server.apply(pod("d", "node-1", "kube-system", "s", &[("app", "x")]));
    server.apply(trusted("e"));
    follower.until("the last of the pods", |follower| follower.is_exempt("e")).await;
    assert!(follower.is_exempt("b") && !follower.is_exempt("c") && follower.index.get("c").is_some());
    assert!(follower.index.get("d").is_none(), "another node's");

    server.apply(pod("b", NODE, "kube-system", "s", &[]));
    follower.until("the label to be removed", |follower| !follower.is_exempt("b")).await;
    server.delete("a");
    follower.until("the pod to be deleted", |follower| follower.index.get("a").is_none()).await;
    let mut ended = trusted("e");
    ended["status"]["phase"] = "Failed".into();
    server.apply(ended);
    follower.until("the pod to be terminated", |follower| !follower.is_exempt("e")).await;

    assert_eq!(follower.relists, [1]);
    let state = follower.watch.state().borrow().clone();
    assert_eq!((state.connected, state.relists, state.last_error.clone()), (true, 1, None));
    assert!(state.events >= 6 && state.last_sync.is_some() && state.errors.is_empty(), "{state:?}");
    for request in server.requests() {
        assert!(request.starts_with("/api/v1/pods?fieldSelector=spec.nodeName%3Dnode-0&"), "{request}");
    }
}

#[tokio::test(flavor = "current_thread")]
async fn requests_name_the_agent() {
    let (server, _follower) = followed().await;
    let expected = format!("imds-agent/{}", env!("CARGO_PKG_VERSION"));
    let found = server.header_values("user-agent");
    assert!(found.len() >= 2 && found.iter().all(|name| *name == expected), "{found:?}");
    // Rules need the specification of pods.
    assert!(server.header_values("accept").iter().all(|types| types == "application/json"));
}

#[tokio::test(flavor = "current_thread")]
async fn list_is_paged() {
    let server = ApiServer::start();
    for number in 0..25 {
        server.apply(trusted(&number.to_string()));
    }
    let mut follower = Follower::with(&server, |options| options.page = 10);
    follower.until("the list", |follower| !follower.relists.is_empty()).await;
    assert_eq!((follower.relists[0], follower.index.pods().count()), (25, 25));
    let lists = server.requests().into_iter().filter(|request| request.contains("limit=10"));
    assert_eq!(lists.count(), 3);
}

#[tokio::test(flavor = "current_thread")]
async fn ended_watch_resumes() {
    let server = ApiServer::start();
    server.apply(trusted("a"));
    let mut follower = Follower::with(&server, |options| options.watch = Duration::from_secs(3));
    follower.until("the first list", |follower| follower.is_exempt("a")).await;
    let watches = |server: &ApiServer| {
        server.requests().iter().filter(|request| request.contains("watch=true")).count()
    };
    let mut state = follower.watch.state();
    while watches(&server) < 3 {
        // Each bookmark changes the watch's state, so that the loop runs once for each.
        server.bookmark();
        timeout(LONG, state.changed()).await.expect("an event").unwrap();
    }
    server.apply(trusted("b"));
    follower.until("the later event", |follower| follower.is_exempt("b")).await;
    let errors = follower.watch.state().borrow().errors.clone();
    assert_eq!((follower.relists.len(), errors), (1, [].into()));
}

#[tokio::test(flavor = "current_thread")]
async fn known_pods_survive_an_outage() {
    let (server, mut follower) = followed().await;
    for _ in 0..3 {
        server.fail(Fault::Close);
    }
    server.disconnect();
    follower.until_state("the loss to be noticed", |state| !state.connected).await;
    assert!(follower.is_exempt("a"));
    server.apply(trusted("b"));
    server.apply(pod("a", NODE, "kube-system", "s", &[]));
    follower.until("the missed events", |follower| follower.is_exempt("b") && !follower.is_exempt("a")).await;
    follower.until_state("a watch", |state| state.connected).await;
    assert_eq!(follower.relists.len(), 1, "the watch must resume without a list");
    assert!(follower.errors(ErrorKind::Connect) + follower.errors(ErrorKind::Closed) >= 3);
    assert!(follower.watch.state().borrow().last_error.is_some());
}

#[tokio::test(flavor = "current_thread")]
async fn expired_version_is_relisted() {
    let (server, mut follower) = followed().await;
    server.apply(trusted("b"));
    follower.until("the second", |follower| follower.is_exempt("b")).await;
    server.forget("a");
    server.disconnect();
    follower.until("the second list", |follower| follower.relists.len() == 2).await;
    assert!(!follower.is_exempt("a") && follower.is_exempt("b"));
    assert!(follower.errors(ErrorKind::Expired) >= 1);
    let requests = server.requests();
    let lists: Vec<_> = requests.iter().filter(|request| request.contains("limit=")).collect();
    assert!(lists[0].contains("resourceVersion=0"), "{lists:?}");
    assert!(lists[1].contains("resourceVersionMatch=NotOlderThan"), "{lists:?}");
}

#[tokio::test(flavor = "current_thread")]
async fn gone_error_in_watch_is_relisted() {
    let (server, mut follower) = followed().await;
    server.fail(Fault::Line(
        r#"{"type":"ERROR","object":{"kind":"Status","code":410,"message":"too old resource version"}}"#,
    ));
    server.forget("a");
    server.disconnect();
    follower.until("the second list", |follower| follower.relists.len() == 2).await;
    assert!(!follower.is_exempt("a") && follower.errors(ErrorKind::Expired) >= 1);
}

#[tokio::test(flavor = "current_thread")]
async fn malformed_deletion_is_relisted() {
    let (server, mut follower) = followed().await;
    server.fail(Fault::Line(r#"{"type":"DELETED","object":{"metadata":{"uid":"a"}}}"#));
    server.forget("a");
    server.disconnect();
    follower.until("the second list", |follower| follower.relists.len() == 2).await;
    assert!(!follower.is_exempt("a"));
    let errors = [ErrorKind::Malformed, ErrorKind::Expired].map(|kind| follower.errors(kind));
    assert_eq!(errors, [1, 0], "the lost event must lead to a list at once");
}

#[tokio::test(flavor = "current_thread")]
async fn future_version_lists_most_recent() {
    let (server, mut follower) = followed().await;
    server.fail(Fault::Status(410, "too old resource version"));
    server.fail(Fault::Status(504, "Timeout: Too large resource version: 9, current: 2"));
    server.forget("a");
    server.disconnect();
    follower.until("the second list", |follower| follower.relists.len() == 2).await;
    assert!(!follower.is_exempt("a"));
    let requests = server.requests();
    let list = requests.iter().rfind(|request| request.contains("limit=")).unwrap();
    assert!(!list.contains("resourceVersion"), "{list}");
}

#[tokio::test(flavor = "current_thread")]
async fn every_failure_is_counted_and_recovers() {
    for (fault, kind, first_list) in [
        (
            Fault::Answer(429, "Retry-After: 1\r\n", "Too many requests, please try again later."),
            ErrorKind::Throttled,
            true,
        ),
        (Fault::Answer(502, "", "<html>\nBad Gateway"), ErrorKind::Server, true),
        (Fault::Status(500, "etcdserver: leader changed"), ErrorKind::Server, true),
        (Fault::Status(403, "pods is forbidden"), ErrorKind::Forbidden, true),
        (Fault::Close, ErrorKind::Connect, true),
        (Fault::HalfList, ErrorKind::Closed, true),
        (Fault::Answer(200, "", "{\"kind\":\"PodList\",\"items\":["), ErrorKind::Malformed, true),
        (Fault::Answer(200, "", "{\"metadata\":{},\"items\":[]}"), ErrorKind::Malformed, true),
        (Fault::Silence, ErrorKind::Timeout, true),
        (Fault::HalfEvent, ErrorKind::Closed, false),
        (Fault::Line("{\"type\":\"ADDED\",\"object\":{\"meta"), ErrorKind::Malformed, false),
        (Fault::Line("{\"type\":\"ADDED\",\"object\":{}}"), ErrorKind::Malformed, false),
        (Fault::Line(""), ErrorKind::Closed, false),
        (Fault::Silence, ErrorKind::Timeout, false),
        (Fault::Status(500, "etcdserver: leader changed"), ErrorKind::Server, false),
        (Fault::Close, ErrorKind::Connect, false),
    ] {
        let case = format!("{fault:?}, first list: {first_list}");
        let server = ApiServer::start();
        server.apply(trusted("a"));
        let change = |options: &mut Options| options.response_timeout = Duration::from_secs(2);
        let mut follower = if first_list {
            server.fail(fault);
            Follower::with(&server, change)
        } else {
            let mut follower = Follower::with(&server, change);
            follower.until("the first list", |follower| follower.is_exempt("a")).await;
            follower.until_state("a watch", |state| state.connected).await;
            server.fail(fault);
            server.disconnect();
            follower
        };
        assert_eq!(follower.is_exempt("a"), !first_list, "{case}");
        follower.until_state(&case, |state| state.errors.contains_key(&kind)).await;
        assert!(first_list || follower.is_exempt("a"), "{case}: known pods stay exempt");
        server.apply(trusted("b"));
        follower.until(&case, |follower| follower.is_exempt("a") && follower.is_exempt("b")).await;
        follower.until_state(&case, |state| state.connected).await;
        let state = follower.watch.state().borrow().clone();
        assert!(state.last_error.is_some_and(|error| !error.message.contains('\n')), "{case}");
        assert_eq!(server.faults_left(), 0, "{case}");
    }
}

#[tokio::test(flavor = "current_thread")]
async fn retry_after_is_respected() {
    let server = ApiServer::start();
    server.fail(Fault::Answer(429, "Retry-After: 200\r\n", ""));
    let mut follower = Follower::new(&server);
    follower.until_state("the error", |state| state.last_error.is_some()).await;
    let state = follower.watch.state().borrow().clone();
    let pause = state.next_attempt.unwrap().duration_since(state.last_error.unwrap().time);
    assert!((200..=201).contains(&pause.as_secs()), "{pause}");
}

#[tokio::test(flavor = "current_thread")]
async fn pods_of_other_nodes_are_ignored() {
    let (server, mut follower) = followed().await;
    let elsewhere = r#"{"type":"ADDED","object":{"metadata":{"uid":"z","namespace":"kube-system","name":"z",
        "resourceVersion":"3","labels":{"app":"x"}},"spec":{"nodeName":"node-1"}}}"#;
    let line: &'static str = elsewhere.replace("\n        ", "").leak();
    server.fail(Fault::Line(line));
    server.disconnect();
    follower.until_state("the line", |state| state.events >= 1).await;
    server.apply(trusted("b"));
    server.apply(trusted("c"));
    follower.until("the next event", |follower| follower.is_exempt("c")).await;
    assert!(follower.index.get("z").is_none());
}

#[tokio::test(flavor = "current_thread")]
async fn endless_response_is_abandoned() {
    let (server, mut follower) = followed().await;
    server.fail(Fault::EndlessLine);
    server.fail(Fault::EndlessList("{\"items\":["));
    server.disconnect();
    follower
        .until_state("both responses to be abandoned", |state| {
            state.errors.get(&ErrorKind::Malformed) == Some(&2)
        })
        .await;
    assert!(follower.is_exempt("a"));
    follower.until("the list", |follower| follower.relists.len() == 2).await;
    assert!(follower.is_exempt("a") && server.faults_left() == 0);
}

#[tokio::test(flavor = "current_thread")]
async fn too_long_list_is_requested_in_pages() {
    let server = ApiServer::start();
    for number in 0..5 {
        server.apply(trusted(&number.to_string()));
    }
    // A list at version 0 has all objects in one answer. The next attempt has pages, the one after it shorter ones.
    for _ in 0..2 {
        server.fail(Fault::EndlessList("{\"items\":["));
    }
    let mut follower = Follower::with(&server, |options| options.page = 4);
    follower.until("the list", |follower| follower.relists == [5]).await;
    follower.until_state("a watch", |state| state.connected).await;
    assert_eq!((follower.errors(ErrorKind::Malformed), server.faults_left()), (2, 0));
    let requests = server.requests();
    let query = |request: &String| request.split_once("node-0&").map(|(_, query)| query.to_owned());
    let lists: Vec<_> =
        requests.iter().filter(|request| request.contains("limit=")).filter_map(query).collect();
    assert_eq!(lists[..3], ["limit=4&resourceVersion=0", "limit=4", "limit=2"], "{requests:?}");
    assert_eq!(lists.len(), 5, "{requests:?}");
}

#[tokio::test(flavor = "current_thread")]
async fn endless_list_pages_are_abandoned() {
    let server = ApiServer::start();
    let part = "{\"metadata\":{\"resourceVersion\":\"7\",\"continue\":\"0\"},\"items\":[]}";
    for _ in 0..5 {
        server.fail(Fault::Answer(200, "Content-Type: application/json\r\n", part));
    }
    server.apply(trusted("a"));
    let mut follower = Follower::with(&server, |options| options.max_pages = 5);
    follower
        .until_state("the list to be abandoned", |state| state.errors.contains_key(&ErrorKind::Malformed))
        .await;
    follower.until("the list", |follower| follower.is_exempt("a")).await;
    assert_eq!((follower.errors(ErrorKind::Malformed), server.faults_left()), (1, 0));
}

#[tokio::test(flavor = "current_thread")]
async fn later_and_changed_kubeconfig_is_read() {
    let server = ApiServer::start();
    server.apply(trusted("a"));
    let mut follower = Follower::new(&server);
    let kubeconfig = follower.directory.path().join("other");
    follower.watch =
        PodWatcher::start(Access::Kubeconfig(kubeconfig.clone()), NODE.to_owned(), fast_retries());
    follower.until_state("the missing file", |state| state.errors.contains_key(&ErrorKind::Config)).await;
    // The server does not support TLS.
    write_kubeconfig(&kubeconfig, &server.url().replace("http:", "https:"));
    follower.until_state("the wrong address", |state| state.errors.contains_key(&ErrorKind::Connect)).await;
    server.write_kubeconfig(&kubeconfig);
    follower.until("the list", |follower| follower.is_exempt("a")).await;
}
