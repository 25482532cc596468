//! The pods of this node: what the API server says of them, and what the kernel knows them by.

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
    /// Ids of those that are to be looked for, for the first time or again: until then, what is known of them counts.
    sought: BTreeSet<String>,
    /// Whether nobody was told of what is known now.
    is_untold: bool,
    /// When the API server told of a pod last that has none.
    last_awaited: Instant,
    /// Those in the node's network namespace that are exempt: known by their cgroups alone, which come and go.
    hosts: BTreeSet<String>,
    /// Cgroups that several pods claim, as they were logged.
    disputes: BTreeSet<String>,
    /// Number of pods that claim the cgroup of another pod.
    disputed: u32,
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
    /// Number of pods that claim the cgroup of another pod.
    pub disputed: u32,
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
            sought: BTreeSet::new(),
            is_untold: true,
            last_awaited: Instant::now(),
            hosts: BTreeSet::new(),
            disputes: BTreeSet::new(),
            disputed: 0,
        }
    }

    /// Takes in what the API server tells. Returns whether that is news.
    pub fn handle(&mut self, event: PodEvent) -> bool {
        let is_first = matches!(event, PodEvent::Relist(_)) && !std::mem::replace(&mut self.is_synced, true);
        let changed = self.index.handle(event);
        let is_news = is_first || !changed.is_empty();
        self.is_untold |= is_news;
        self.log_disputes();
        for uid in changed {
            self.last_awaited = Instant::now();
            if self.index.get(&uid).is_some() {
                // It may have started a container, or a new sandbox.
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
            disputed: self.disputed,
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

    /// Reports whether the API server is asked for pods.
    #[must_use]
    pub fn are_looked_up(&self) -> bool {
        self.doubt != Some(Doubt::NotLookedUp)
    }

    /// Reports whether the link leads to a known pod.
    #[must_use]
    pub fn have_link(&self, index: u32) -> bool {
        self.sandboxes.values().any(|sandbox| sandbox.senders.interfaces.contains(&index))
    }

    /// A link is there that was not.
    pub fn link_came(&mut self, link: &Link) {
        if link.peer_netns.is_some() {
            self.seek(|sandbox| sandbox.netns_id == link.peer_netns);
        }
    }

    /// A link is gone; who knows whether the sandbox is.
    pub fn link_went(&mut self, index: u32) {
        let led_to = |sandbox: &Sandbox| sandbox.senders.interfaces.contains(&index);
        self.seek(led_to);
        // Another pod's link may have its index next.
        let count = self.sandboxes.len();
        self.sandboxes.retain(|_, sandbox| !led_to(sandbox));
        self.is_untold |= self.sandboxes.len() < count;
    }

    /// Where pods are may have changed unseen.
    pub fn forget_sandboxes(&mut self) {
        self.sandboxes.clear();
        self.is_untold = true;
        self.seek_awaited();
    }

    /// Looks again, with the next [`Pods::locate`], for those of which not all could be found out.
    pub fn retry(&mut self) {
        self.seek(|sandbox| !sandbox.senders.failures.is_empty());
        if self.awaited().next().is_some() {
            // The kubelet may have moved, and what it left behind be there still.
            self.tree.search();
            self.seek_awaited();
        }
    }

    /// Looks again, with the next [`Pods::locate`], for those that were awaited and have a sandbox now, and for those in the
    /// node's network namespace that are exempt and have other cgroups than when they were located.
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

    /// Whether there are some whose sandboxes are to be looked for.
    #[must_use]
    pub fn are_sought(&self) -> bool {
        !self.sought.is_empty()
    }

    /// Looks for the sandboxes of the next `count` that are sought. `links` are those of pods.
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

    /// After how long, since the last time, [`Pods::seek_moved`] is worth a call; `None` where nothing is awaited. The longer
    /// nothing comes, the less often it is.
    #[must_use]
    pub fn pause(&self) -> Option<Duration> {
        let (shortest, longest) = PAUSES;
        let is_worth_it = self.awaited().next().is_some() || !self.hosts.is_empty();
        is_worth_it.then(|| (self.last_awaited.elapsed() / 10).clamp(shortest, longest))
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

    /// Whether [`Pods::names`] are to be told: all are known that can be, and they were not told.
    #[must_use]
    pub fn are_to_be_told(&self) -> bool {
        self.is_untold && self.is_synced && !self.are_sought()
    }

    /// They were told.
    pub fn were_told(&mut self) {
        self.is_untold = false;
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

    fn seek(&mut self, is_meant: impl Fn(&Sandbox) -> bool) {
        let meant = self.sandboxes.iter().filter(|(_, sandbox)| is_meant(sandbox));
        self.sought.extend(meant.map(|(uid, _)| uid.clone()));
    }

    fn seek_awaited(&mut self) {
        let awaited: Vec<_> = self.awaited().map(|pod| pod.uid.clone()).collect();
        self.sought.extend(awaited);
    }
}
