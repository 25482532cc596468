//! Pods of this node: their metadata from the API server, and the identities by which the kernel knows them.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
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

/// Shortest and longest interval of the poll for sandboxes that do not exist yet.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_millis(500));

/// State of the pods of this node.
#[derive(Debug)]
pub struct Pods {
    index: Index,
    /// Reason why the set of pods may be incomplete.
    doubt: Option<Doubt>,
    /// True once the API server has listed all pods.
    is_synced: bool,
    tree: Tree,
    /// Resolved sandboxes, by pod UID.
    sandboxes: BTreeMap<String, Sandbox>,
    /// UIDs of the pods whose sandbox has to be resolved, for the first time or again. Until then the previous sandbox
    /// counts.
    sought: BTreeSet<String>,
    /// True if the pod names changed since they were written to the maps.
    is_untold: bool,
    /// Time of the last event about a pod without a sandbox.
    last_awaited: Instant,
    /// UIDs of the exempt hostNetwork pods. The datapath knows them by their containers' cgroups only, which come and
    /// go.
    hosts: BTreeSet<String>,
    /// Cgroups that several pods claim, as text that was logged.
    disputes: BTreeSet<String>,
    /// Number of pods that claim the cgroup of another pod.
    disputed: u32,
}

/// Reason why the set of pods may be incomplete.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Doubt {
    /// The pod watch is disabled.
    NotLookedUp,
    /// The API server has not listed the pods yet.
    NotTold,
}

/// Pod and container that a subject of the datapath stands for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Name<'p> {
    /// Pod to which the subject belongs.
    pub pod: &'p Pod,
    /// Name of the container, if the subject is the cgroup of one.
    pub container: Option<&'p str>,
}

/// Metadata of a pod for output. The agent records it so that other processes can name the pod. The JSON form only ever
/// gains fields.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub struct Identity {
    /// Namespace in which the pod was created.
    pub namespace: String,
    /// Name of the pod, without the namespace.
    pub pod: String,
    /// Name of the pod's service account.
    pub service_account: String,
    /// Name of the container, if it is known.
    pub container: Option<String>,
    /// Label that names the application, as `key=value`.
    pub label: Option<String>,
    /// UID of the pod, which is never reused.
    pub uid: String,
}

impl fmt::Display for Identity {
    /// Formats as `namespace/pod`, or `namespace/pod[container]` if the container is known.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.pod)?;
        self.container.iter().try_for_each(|container| write!(f, "[{container}]"))
    }
}

/// Status of the pod watch. The JSON form only ever gains fields.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Lookup {
    /// Name of the node in the cluster.
    pub node: String,
    /// True while the API server answers the watch.
    pub is_connected: bool,
    /// Time of the last change of `is_connected`.
    pub since: Timestamp,
    /// Time of the last moment at which the set of pods was known to be complete.
    pub synced_at: Option<Timestamp>,
    /// Time of the last error of the watch.
    pub failed_at: Option<Timestamp>,
    /// Last error of the watch.
    pub error: Option<String>,
    /// Number of pods that the API server listed.
    pub pods: u32,
    /// Number of known pods whose sandbox was not found.
    pub awaited: u32,
    /// Number of pods that claim the cgroup of another pod.
    pub disputed: u32,
}

impl Pods {
    /// Returns an empty set of pods. `are_looked_up`: a pod watch will fill it.
    #[must_use]
    pub fn new(are_looked_up: bool) -> Self {
        Self {
            index: Index::default(),
            doubt: (!are_looked_up).then_some(Doubt::NotLookedUp),
            is_synced: false,
            tree: Tree::default(),
            sandboxes: BTreeMap::new(),
            sought: BTreeSet::new(),
            is_untold: true,
            last_awaited: Instant::now(),
            hosts: BTreeSet::new(),
            disputes: BTreeSet::new(),
            disputed: 0,
        }
    }

    /// Applies an event of the pod watch. Returns whether it changed anything.
    pub fn handle(&mut self, event: PodEvent) -> bool {
        let is_first = matches!(event, PodEvent::Relist(_)) && !std::mem::replace(&mut self.is_synced, true);
        let changed = self.index.handle(event);
        let is_news = is_first || !changed.is_empty();
        self.is_untold |= is_news;
        self.log_disputes();
        for uid in changed {
            self.last_awaited = Instant::now();
            if self.index.get(&uid).is_some() {
                // The pod may have a new container or sandbox.
                self.sought.insert(uid);
            } else {
                self.sandboxes.remove(&uid);
            }
        }
        is_news
    }

    /// Returns the number of pods that claim the cgroup of another pod.
    #[must_use]
    pub fn disputed(&self) -> u32 {
        self.disputed
    }

    fn log_disputes(&mut self) {
        let disputes: BTreeSet<_> = self.index.disputes().map(|dispute| dispute.to_string()).collect();
        for dispute in disputes.difference(&self.disputes) {
            log::warn!("{dispute}: exemptions go by the oldest pod only, delete the others");
        }
        self.disputes = disputes;
        let pods: usize = self.index.disputes().map(|dispute| dispute.others.len()).sum();
        self.disputed = u32::try_from(pods).unwrap_or(u32::MAX);
    }

    /// Applies the state of the pod watch. Returns whether [`Pods::senders`] changes.
    pub fn take_in(&mut self, state: &WatchState) -> bool {
        let has_failed = !state.connected && state.last_error.is_some();
        let doubt = (has_failed && !self.is_synced).then_some(Doubt::NotTold);
        std::mem::replace(&mut self.doubt, doubt) != doubt
    }

    /// Returns the status of the pod watch. `state` is the state of the watch of this node.
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
            disputed: self.disputed,
        }
    }

    /// Reports whether the API server has listed all pods. Until then the exempt pods are not known completely.
    #[must_use]
    pub fn is_synced(&self) -> bool {
        self.is_synced
    }

    /// Tracks the containers of the hostNetwork pods that `rules` match.
    pub fn follow_hosts<'r>(&mut self, rules: impl Iterator<Item = &'r config::Pods>) {
        let meant = rules.flat_map(|rule| self.index.meant(rule));
        self.hosts = meant.filter(|pod| pod.host_network).map(|pod| pod.uid.clone()).collect();
    }

    /// Reports whether the pod watch is enabled.
    #[must_use]
    pub fn are_looked_up(&self) -> bool {
        self.doubt != Some(Doubt::NotLookedUp)
    }

    /// Reports whether the link leads to a known pod.
    #[must_use]
    pub fn have_link(&self, index: u32) -> bool {
        self.sandboxes.values().any(|sandbox| sandbox.senders.interfaces.contains(&index))
    }

    /// Handles a new link: the sandboxes behind it have to be resolved again.
    pub fn link_came(&mut self, link: &Link) {
        if link.peer_netns.is_some() {
            self.seek(|sandbox| sandbox.netns_id == link.peer_netns);
        }
    }

    /// Handles the deletion of a link. The sandbox behind it may still exist.
    pub fn link_went(&mut self, index: u32) {
        let led_to = |sandbox: &Sandbox| sandbox.senders.interfaces.contains(&index);
        self.seek(led_to);
        // The link of another pod may get this index next.
        let count = self.sandboxes.len();
        self.sandboxes.retain(|_, sandbox| !led_to(sandbox));
        self.is_untold |= self.sandboxes.len() < count;
    }

    /// Drops all sandboxes, after events were lost.
    pub fn forget_sandboxes(&mut self) {
        self.sandboxes.clear();
        self.is_untold = true;
        self.seek_awaited();
    }

    /// Queues the pods that could not be resolved completely. The next [`Pods::locate`] retries them.
    pub fn retry(&mut self) {
        self.seek(|sandbox| !sandbox.senders.failures.is_empty());
        if self.awaited().next().is_some() {
            // The kubelet may have moved to other cgroups, and left the old ones behind.
            self.tree.search();
            self.seek_awaited();
        }
    }

    /// Queues the pods that have a sandbox now but had none before, and the exempt hostNetwork pods whose cgroups
    /// changed. The next [`Pods::locate`] resolves them.
    pub fn seek_moved(&mut self) {
        if self.tree.is_stale() {
            self.tree.search();
        }
        let cgroups = |pod: &Pod| self.tree.of(&pod.cgroup_uid);
        let unsought = self.awaited().filter(|pod| !self.sought.contains(&pod.uid));
        let come = unsought.filter(|pod| sandbox::is_inhabited(&cgroups(pod)));
        let hosts = self.located().filter(|(pod, _)| self.hosts.contains(&pod.uid));
        let moved =
            hosts.filter(|(pod, sandbox)| !sandbox.cgroups.keys().eq(&sandbox::cgroup_ids(&cgroups(pod))));
        let found: Vec<_> = come.chain(moved.map(|(pod, _)| pod)).map(|pod| pod.uid.clone()).collect();
        self.sought.extend(found);
    }

    /// Reports whether pods are queued whose sandboxes have to be resolved.
    #[must_use]
    pub fn are_sought(&self) -> bool {
        !self.sought.is_empty()
    }

    /// Resolves the sandboxes of the next `count` queued pods. `links` are the links of pods.
    pub async fn locate(&mut self, finder: &Finder, netlink: &Netlink, links: &[&Link], count: usize) {
        if self.tree.is_stale() {
            self.tree.search();
        }
        for _ in 0..count {
            let Some(uid) = self.sought.pop_first() else { break };
            let Some(pod) = self.index.get(&uid) else { continue };
            if let Some(cgroups) = self.tree.ambiguous(&pod.cgroup_uid) {
                let sandbox = Sandbox::ambiguous(pod, &cgroups);
                self.is_untold |= self.sandboxes.insert(uid, sandbox.clone()) != Some(sandbox);
                continue;
            }
            let cgroups = self.tree.of(&pod.cgroup_uid);
            let found = finder.pod(netlink, links, &cgroups, pod.host_network).await;
            log::debug!("pod {uid}: {found:?}");
            let before = match found.clone() {
                Some(sandbox) => self.sandboxes.insert(uid, sandbox),
                None => self.sandboxes.remove(&uid),
            };
            self.is_untold |= before != found;
        }
    }

    /// Returns the time after which the next [`Pods::seek_moved`] is due, or `None` if no pod waits for its sandbox.
    /// The interval grows with the time since the last event.
    #[must_use]
    pub fn pause(&self) -> Option<Duration> {
        let (shortest, longest) = PAUSES;
        let is_worth_it = self.awaited().next().is_some() || !self.hosts.is_empty();
        is_worth_it.then(|| (self.last_awaited.elapsed() / 10).clamp(shortest, longest))
    }

    /// Returns the identities of the pods that a rule matches.
    #[must_use]
    pub fn senders(&self, rule: &config::Pods) -> Senders {
        let mut senders = Senders::default();
        match self.doubt {
            Some(Doubt::NotLookedUp) => senders.fail(
                "the pod watch is disabled: run in the cluster, or set kubernetes.enabled and kubernetes.kubeconfig",
            ),
            Some(Doubt::NotTold) => senders.fail("the API server has not sent this node's pods yet"),
            None => {}
        }
        for pod in self.index.meant(rule) {
            if let Some(sandbox) = self.sandboxes.get(&pod.uid) {
                senders.extend(&sandbox.senders);
            }
        }
        senders
    }

    /// Reports whether [`Pods::names`] has to be written to the maps: it changed, and all pods are resolved.
    #[must_use]
    pub fn are_to_be_told(&self) -> bool {
        self.is_untold && self.is_synced && !self.are_sought()
    }

    /// Records that the names were written to the maps.
    pub fn were_told(&mut self) {
        self.is_untold = false;
    }

    /// Returns the pod and container behind each subject that the datapath knows.
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

    fn seek(&mut self, is_meant: impl Fn(&Sandbox) -> bool) {
        let meant = self.sandboxes.iter().filter(|(_, sandbox)| is_meant(sandbox));
        self.sought.extend(meant.map(|(uid, _)| uid.clone()));
    }

    fn seek_awaited(&mut self) {
        let awaited: Vec<_> = self.awaited().map(|pod| pod.uid.clone()).collect();
        self.sought.extend(awaited);
    }
}
