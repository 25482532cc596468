//! The pods of this node: what the API server says of them, and what the kernel knows them by.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::PathBuf,
    time::Duration,
};

use imds_ebpf_common::{Subject, SubjectKind};
use jiff::Timestamp;
use serde::Serialize;
use tokio::time::Instant;

use crate::{
    config,
    kube::{Index, Pod, PodEvent, WatchState},
    node::{
        links::Link,
        netlink::Netlink,
        pod_cgroups::Tree,
        sandbox::{self, Sandbox},
        senders::{Finder, Senders},
    },
};

/// Limits of the pauses in which it is looked for sandboxes that are not there yet.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_millis(500));

/// The pods of this node.
#[derive(Debug)]
pub struct Pods {
    index: Index,
    /// Why nobody may be known.
    doubt: Option<Doubt>,
    /// Whether the API server has told of all of them.
    is_synced: bool,
    tree: Tree,
    /// Where those are that have a sandbox, by their ids.
    sandboxes: BTreeMap<String, Sandbox>,
    /// When the API server told of a pod last that has none.
    last_awaited: Instant,
    /// Those in the node's network namespace that are exempt: known by their cgroups alone, which come and go.
    hosts: BTreeSet<String>,
}

/// Why nobody may be known.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Doubt {
    /// The API server is not asked.
    NotLookedUp,
    /// It has not told of anybody.
    NotTold,
}

/// What a subject of the datapath is to the cluster.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Name<'p> {
    /// The pod.
    pub pod: &'p Pod,
    /// Its container, where the subject is one's.
    pub container: Option<&'p str>,
}

/// A pod, for people: as much of it as is recorded for whatever process wants to name it. In its JSON form, fields are only
/// added.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub struct Identity {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub pod: String,
    /// Its service account.
    pub service_account: String,
    /// The container, where one is known.
    pub container: Option<String>,
    /// A label that says what it runs, as `key=value`.
    pub label: Option<String>,
    /// Its id, which no other pod ever has.
    pub uid: String,
}

impl fmt::Display for Identity {
    /// `namespace/pod`, and the container where one is known: `namespace/pod[container]`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.pod)?;
        self.container.iter().try_for_each(|container| write!(f, "[{container}]"))
    }
}

/// How the looking up of pods goes. In its JSON form, fields are only added.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Lookup {
    /// The node's name in the cluster.
    pub node: String,
    /// Whether the API server tells of pods now.
    pub is_connected: bool,
    /// Since when that is so.
    pub since: Timestamp,
    /// When what is known was last known to be all there is.
    pub synced_at: Option<Timestamp>,
    /// When the API server last failed to tell.
    pub failed_at: Option<Timestamp>,
    /// What failed then.
    pub error: Option<String>,
    /// How many pods are known.
    pub pods: u32,
    /// How many of them have no sandbox that could be found.
    pub awaited: u32,
}

impl Pods {
    /// None that are known yet; `are_looked_up`: whether that can change.
    #[must_use]
    pub fn new(are_looked_up: bool) -> Self {
        Self {
            index: Index::default(),
            doubt: (!are_looked_up).then_some(Doubt::NotLookedUp),
            is_synced: false,
            tree: Tree::default(),
            sandboxes: BTreeMap::new(),
            last_awaited: Instant::now(),
            hosts: BTreeSet::new(),
        }
    }

    /// Takes in what the API server tells. Returns whether that is news.
    pub fn handle(&mut self, event: PodEvent) -> bool {
        let is_first = matches!(event, PodEvent::Relist(_)) && !std::mem::replace(&mut self.is_synced, true);
        let changed = self.index.handle(event);
        for uid in &changed {
            // It may have started a container, or a new sandbox.
            self.sandboxes.remove(uid);
            self.last_awaited = Instant::now();
        }
        is_first || !changed.is_empty()
    }

    /// Takes in how the watch of them goes. Returns whether that changes who is known.
    pub fn take_in(&mut self, state: &WatchState) -> bool {
        let has_failed = !state.connected && state.last_error.is_some();
        let doubt = (has_failed && !self.is_synced).then_some(Doubt::NotTold);
        std::mem::replace(&mut self.doubt, doubt) != doubt
    }

    /// How the looking up goes, of which the watch of this node says `state`.
    #[must_use]
    pub fn lookup(&self, node: &str, state: &WatchState) -> Lookup {
        let (failed_at, error) =
            state.last_error.as_ref().map(|failure| (failure.time, failure.message.clone())).unzip();
        let number = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        Lookup {
            node: node.to_owned(),
            is_connected: state.connected,
            since: state.since,
            synced_at: state.last_sync,
            failed_at,
            error,
            pods: number(self.index.pods().count()),
            awaited: number(self.awaited().count()),
        }
    }

    /// Whether the API server has told of all pods. Until then nobody knows who is to be exempt.
    #[must_use]
    pub fn is_synced(&self) -> bool {
        self.is_synced
    }

    /// Follows the containers of those in the node's network namespace that `rules` mean.
    pub fn follow_hosts<'r>(&mut self, rules: impl Iterator<Item = &'r config::Pods>) {
        let meant = rules.flat_map(|rule| self.index.meant(rule));
        self.hosts = meant.filter(|pod| pod.host_network).map(|pod| pod.uid.clone()).collect();
    }

    /// A link is there that was not.
    pub fn link_came(&mut self, link: &Link) {
        if link.peer_netns.is_some() {
            self.sandboxes.retain(|_, sandbox| sandbox.netns_id != link.peer_netns);
        }
    }

    /// A link is gone; who knows whether the sandbox is.
    pub fn link_went(&mut self, index: u32) {
        self.sandboxes.retain(|_, sandbox| !sandbox.senders.interfaces.contains(&index));
    }

    /// Where pods are may have changed unseen.
    pub fn forget_sandboxes(&mut self) {
        self.sandboxes.clear();
    }

    /// Looks again, with the next [`Pods::locate`], for those of which not all could be found out.
    pub fn retry(&mut self) {
        self.sandboxes.retain(|_, sandbox| sandbox.senders.failures.is_empty());
        if self.awaited().next().is_some() {
            // The kubelet may have moved, and what it left behind be there still.
            self.tree.search();
        }
    }

    /// Finds the sandboxes that are not known yet, where there are any. `links` are those of pods.
    pub async fn locate(&mut self, finder: &Finder, netlink: &Netlink, links: &[&Link]) {
        let index = &self.index;
        self.sandboxes.retain(|uid, _| index.get(uid).is_some());
        if !self.is_asked_for() {
            return;
        }
        if self.tree.is_stale() {
            self.tree.search();
        }
        let cgroups = self.tree.pods();
        for uid in self.moved_hosts(&cgroups) {
            self.sandboxes.remove(&uid);
        }
        let awaited: Vec<_> =
            self.awaited().map(|pod| (pod.uid.clone(), pod.cgroup_uid.clone(), pod.host_network)).collect();
        for (uid, cgroup_uid, host_network) in awaited {
            let Some(cgroups) = cgroups.get(&cgroup_uid) else { continue };
            if let Some(sandbox) = finder.pod(netlink, links, cgroups, host_network).await {
                log::debug!("pod {uid}: {sandbox:?}");
                self.sandboxes.insert(uid, sandbox);
            }
        }
    }

    /// How long to wait before [`Pods::have_moved`] is worth asking; `None` where nothing is awaited. The longer nothing
    /// comes, the less often it is looked for.
    #[must_use]
    pub fn pause(&self) -> Option<Duration> {
        let (shortest, longest) = PAUSES;
        self.is_asked_for().then(|| (self.last_awaited.elapsed() / 10).clamp(shortest, longest))
    }

    /// Whether sandboxes have come that were awaited, or containers of exempt pods in the node's network namespace.
    #[must_use]
    pub fn have_moved(&self) -> bool {
        let cgroups = self.tree.pods();
        self.awaited().any(|pod| sandbox::is_inhabited(of(pod, &cgroups)))
            || !self.moved_hosts(&cgroups).is_empty()
    }

    /// What the datapath knows those by whom a rule means.
    #[must_use]
    pub fn senders(&self, rule: &config::Pods) -> Senders {
        let mut senders = Senders::default();
        match self.doubt {
            Some(Doubt::NotLookedUp) => senders.fail(
                "no pods are looked up here: run in the cluster, or set kubernetes.enabled and kubernetes.kubeconfig",
            ),
            Some(Doubt::NotTold) => senders.fail("the API server has not told of this node's pods yet"),
            None => {}
        }
        for pod in self.index.meant(rule) {
            if let Some(sandbox) = self.sandboxes.get(&pod.uid) {
                senders.extend(&sandbox.senders);
            }
        }
        senders
    }

    /// Who is behind what the datapath knows.
    #[must_use]
    pub fn names(&self) -> BTreeMap<Subject, Name<'_>> {
        let mut names = BTreeMap::new();
        for (pod, sandbox) in self.located() {
            let of_pod = Name { pod, container: None };
            let Senders { interfaces, cookies, .. } = &sandbox.senders;
            let interfaces = interfaces.iter().map(|&index| (SubjectKind::Interface, index.into()));
            let cookies = cookies.iter().map(|&cookie| (SubjectKind::Netns, cookie));
            names.extend(interfaces.chain(cookies).map(|(kind, id)| (Subject::new(kind, id), of_pod)));
            for (&id, container) in &sandbox.cgroups {
                let container = container.as_ref().and_then(|id| pod.containers.get(id)).map(String::as_str);
                names.insert(Subject::new(SubjectKind::Cgroup, id), Name { pod, container });
            }
        }
        names
    }

    fn located(&self) -> impl Iterator<Item = (&Pod, &Sandbox)> {
        self.index.living().filter_map(|pod| Some((pod, self.sandboxes.get(&pod.uid)?)))
    }

    fn awaited(&self) -> impl Iterator<Item = &Pod> {
        self.index.living().filter(|pod| !self.sandboxes.contains_key(&pod.uid))
    }

    fn is_asked_for(&self) -> bool {
        self.awaited().next().is_some() || !self.hosts.is_empty()
    }

    /// Those in the node's network namespace that are exempt and have other cgroups than when they were located.
    fn moved_hosts(&self, cgroups: &BTreeMap<String, Vec<PathBuf>>) -> Vec<String> {
        let hosts = self.located().filter(|(pod, _)| self.hosts.contains(&pod.uid));
        let moved =
            hosts.filter(|(pod, sandbox)| !sandbox.cgroups.keys().eq(&sandbox::cgroup_ids(of(pod, cgroups))));
        moved.map(|(pod, _)| pod.uid.clone()).collect()
    }
}

/// A pod's part of all cgroups.
fn of<'c>(pod: &Pod, cgroups: &'c BTreeMap<String, Vec<PathBuf>>) -> &'c [PathBuf] {
    cgroups.get(&pod.cgroup_uid).map(Vec::as_slice).unwrap_or_default()
}
