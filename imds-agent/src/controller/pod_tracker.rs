//! Pods of this node: their metadata from the API server, and the identities by which the kernel knows them.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use imds_ebpf_common::{Subject, SubjectKind};
use tokio::time::Instant;

use crate::{
    config,
    kube::{
        ErrorKind, Failure, Index, NamespaceEvent, Pod, PodEvent, WatchState,
        pod_ref::{NamespaceWatchStatus, PodContainer, PodWatchStatus},
    },
    node::{
        link::Link,
        netlink::Netlink,
        pod_cgroups::KubepodsCgroups,
        sandbox::{self, Sandbox},
        sender_resolver::{IdentitySet, SenderResolver},
    },
};

/// Shortest and longest interval of the poll for sandboxes that do not exist yet.
const RETRY_DELAYS: (Duration, Duration) = (Duration::from_millis(100), Duration::from_millis(500));

/// Interval of the search for another kubelet cgroup, while a new pod has no cgroup below the known ones.
const RESCAN_INTERVAL: Duration = Duration::from_millis(500);
/// Time after a pod event during which that search runs. A pod that never gets a sandbox must not cause work for ever.
const RESCAN_WINDOW: Duration = Duration::from_secs(10);

/// State of the pods of this node.
#[derive(Debug)]
pub struct PodTracker {
    index: Index,
    /// Reason why the set of pods may be incomplete.
    sync: Option<SyncState>,
    /// True once the API server has listed all pods. Until then the exempt pods are not known completely.
    pub(super) is_synced: bool,
    cgroup_tree: KubepodsCgroups,
    /// Resolved sandboxes, by pod UID.
    sandboxes: BTreeMap<String, Sandbox>,
    /// UIDs of the pods whose sandbox has to be resolved, for the first time or again. Until then the previous sandbox
    /// counts.
    pending: BTreeSet<String>,
    /// True if the pod names changed since they were written to the maps.
    pub(super) names_dirty: bool,
    /// Time of the last event about a pod without a sandbox.
    last_change: Instant,
    /// Time of the last search for kubelet cgroups.
    last_rescan: Instant,
    /// UIDs of the exempt hostNetwork pods. The datapath knows them by their containers' cgroups only, which come and
    /// go.
    host_network_pods: BTreeSet<String>,
    /// Cgroups that several pods claim, as text that was logged.
    disputes: BTreeSet<String>,
    /// Number of pods that claim the cgroup of another pod.
    pub(super) disputed: u32,
    /// State of the namespace watch, if a rule needs one.
    pub(super) namespace_watch: Option<WatchState>,
}

/// Reason why the set of pods may be incomplete.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum SyncState {
    /// The pod watch is disabled.
    Disabled,
    /// The API server has not listed the pods yet.
    NotSynced,
}

impl PodTracker {
    /// Returns an empty set of pods. `is_enabled`: a pod watch will fill it.
    pub fn new(is_enabled: bool) -> Self {
        Self {
            index: Index::default(),
            sync: (!is_enabled).then_some(SyncState::Disabled),
            is_synced: false,
            cgroup_tree: KubepodsCgroups::default(),
            sandboxes: BTreeMap::new(),
            pending: BTreeSet::new(),
            names_dirty: true,
            last_change: Instant::now(),
            last_rescan: Instant::now(),
            host_network_pods: BTreeSet::new(),
            disputes: BTreeSet::new(),
            disputed: 0,
            namespace_watch: None,
        }
    }

    /// Applies an event of the pod watch. Returns whether it changed anything.
    pub fn on_pod_event(&mut self, event: PodEvent) -> bool {
        let is_first = matches!(event, PodEvent::Relist(_)) && !std::mem::replace(&mut self.is_synced, true);
        let changed = self.index.handle(event);
        let is_changed = is_first || !changed.is_empty();
        self.names_dirty |= is_changed;
        self.log_disputes();
        for uid in changed {
            self.last_change = Instant::now();
            if self.index.get(&uid).is_some() {
                // The pod may have a new container or sandbox.
                self.pending.insert(uid);
            } else {
                self.sandboxes.remove(&uid);
            }
        }
        is_changed
    }

    /// Applies an event of the namespace watch, which reports the labels with these keys. Returns whether
    /// [`PodTracker::senders`] may change.
    pub fn on_namespace_event(&mut self, event: NamespaceEvent, label_keys: &BTreeSet<String>) -> bool {
        // A list may lack namespaces to whose pods the previous agent gave exemptions.
        let is_relist = matches!(event, NamespaceEvent::Relist(_));
        self.index.handle_namespaces(event, label_keys) || is_relist
    }

    /// Applies the state of the namespace watch. Returns whether [`PodTracker::senders`] may change.
    pub fn on_namespace_watch_status(&mut self, state: WatchState) -> bool {
        let previous = self.namespace_watch.replace(state);
        let text =
            |state: &Option<WatchState>| failure(state.as_ref()).map(|failure| failure.message.clone());
        text(&previous) != text(&self.namespace_watch)
    }

    /// Forgets all namespaces. Returns whether there was a namespace watch.
    pub fn clear_namespaces(&mut self) -> bool {
        self.index.clear_namespaces();
        self.namespace_watch.take().is_some()
    }

    /// Reports whether the labels of namespaces that decide about a rule are known.
    pub fn knows_namespaces(&self, rule: &config::PodSelector) -> bool {
        rule.namespace.labels().is_none_or(|selector| self.index.namespaces().knows(selector))
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

    /// Applies the state of the pod watch. Returns whether [`PodTracker::senders`] changes.
    pub fn on_watch_status(&mut self, state: &WatchState) -> bool {
        let has_failed = !state.connected && state.last_error.is_some();
        let sync = (has_failed && !self.is_synced).then_some(SyncState::NotSynced);
        std::mem::replace(&mut self.sync, sync) != sync
    }

    /// Returns the status of the pod watch. `state` is the state of the watch of this node.
    pub fn watch_status(&self, node: &str, state: &WatchState) -> PodWatchStatus {
        let (failed_at, error) =
            state.last_error.as_ref().map(|failure| (failure.time, failure.message.clone())).unzip();
        let number = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        PodWatchStatus {
            node: node.to_owned(),
            connected: state.connected,
            since: state.since,
            synced_at: state.last_sync,
            failed_at,
            error,
            pods: number(self.index.pods().count()),
            unresolved: number(self.unresolved().count()),
            disputed: self.disputed,
            namespaces: self.namespace_watch.as_ref().map(|state| NamespaceWatchStatus {
                connected: state.connected,
                known: number(self.index.namespaces().len()),
                error: state.last_error.as_ref().map(|failure| failure.message.clone()),
            }),
        }
    }

    /// Returns the reason why the namespaces of a rule may be incomplete.
    fn namespace_failure(&self, rule: &config::PodSelector) -> Option<&str> {
        rule.namespace.labels()?;
        match failure(self.namespace_watch.as_ref())? {
            // Known labels may be outdated until the operator changes the role.
            Failure { kind: ErrorKind::Forbidden, message, .. } => Some(message),
            _ if self.knows_namespaces(rule) => None,
            _ => Some("the API server has not sent the namespaces yet"),
        }
    }

    /// Tracks the containers of the hostNetwork pods that `rules` match.
    pub fn track_host_network_pods<'r>(&mut self, rules: impl Iterator<Item = &'r config::PodSelector>) {
        let matching = rules.flat_map(|rule| self.index.matching(rule));
        self.host_network_pods = matching.filter(|pod| pod.host_network).map(|pod| pod.uid.clone()).collect();
    }

    /// Reports whether the pod watch is enabled.
    pub fn is_enabled(&self) -> bool {
        self.sync != Some(SyncState::Disabled)
    }

    /// Reports whether the link leads to a known pod.
    pub fn has_link(&self, index: u32) -> bool {
        self.sandboxes.values().any(|sandbox| sandbox.senders.interfaces.contains(&index))
    }

    /// Handles a new link: the sandboxes behind it have to be resolved again.
    pub fn on_link_added(&mut self, link: &Link) {
        if link.peer_netns.is_some() {
            self.enqueue(|sandbox| sandbox.netns_id == link.peer_netns);
        }
    }

    /// Handles the deletion of a link. The sandbox behind it may still exist.
    pub fn on_link_deleted(&mut self, index: u32) {
        let leads_to = |sandbox: &Sandbox| sandbox.senders.interfaces.contains(&index);
        self.enqueue(leads_to);
        // The link of another pod may get this index next.
        let count = self.sandboxes.len();
        self.sandboxes.retain(|_, sandbox| !leads_to(sandbox));
        self.names_dirty |= self.sandboxes.len() < count;
    }

    /// Drops all sandboxes, after events were lost.
    pub fn drop_sandboxes(&mut self) {
        self.sandboxes.clear();
        self.names_dirty = true;
        self.enqueue_unresolved();
    }

    /// Queues the pods that could not be resolved completely. The next [`PodTracker::resolve_sandboxes`] retries them.
    pub fn retry(&mut self) {
        self.enqueue(|sandbox| !sandbox.senders.errors.is_empty());
        if self.unresolved().next().is_some() {
            // The kubelet may have moved to other cgroups, and left the old ones behind.
            self.cgroup_tree.rescan();
            self.enqueue_unresolved();
        }
    }

    /// Queues the pods with an interface that `rules` match.
    pub fn enqueue_exempt<'r>(&mut self, rules: impl Iterator<Item = &'r config::PodSelector>) {
        let exempt: BTreeSet<_> =
            rules.flat_map(|rule| self.index.matching(rule)).map(|pod| &pod.uid).collect();
        let has_interface = |uid: &&&String| {
            let sandbox = self.sandboxes.get(uid.as_str());
            sandbox.is_some_and(|sandbox| !sandbox.senders.interfaces.is_empty())
        };
        self.pending.extend(exempt.iter().filter(has_interface).map(|uid| (*uid).clone()));
    }

    /// Queues the pods that have a sandbox now but had none before, and the exempt hostNetwork pods whose cgroups
    /// changed. The next [`PodTracker::resolve_sandboxes`] resolves them.
    pub fn enqueue_changed(&mut self) {
        if self.cgroup_tree.is_stale() || self.needs_rescan() {
            self.cgroup_tree.rescan();
            self.last_rescan = Instant::now();
        }
        let cgroups = |pod: &Pod| self.cgroup_tree.of_pod(&pod.cgroup_uid);
        let idle = self.unresolved().filter(|pod| !self.pending.contains(&pod.uid));
        let come = idle.filter(|pod| sandbox::is_populated(&cgroups(pod)));
        let host_network_pods = self.resolved().filter(|(pod, _)| self.host_network_pods.contains(&pod.uid));
        let moved = host_network_pods
            .filter(|(pod, sandbox)| !sandbox.cgroup_ids().eq(sandbox::cgroup_ids(&cgroups(pod))));
        let found: Vec<_> = come.chain(moved.map(|(pod, _)| pod)).map(|pod| pod.uid.clone()).collect();
        self.pending.extend(found);
    }

    /// Reports whether a new pod may be below a kubelet cgroup that appeared after the last search.
    fn needs_rescan(&self) -> bool {
        self.last_rescan.elapsed() >= RESCAN_INTERVAL
            && self.last_change.elapsed() < RESCAN_WINDOW
            && self.unresolved().any(|pod| self.cgroup_tree.of_pod(&pod.cgroup_uid).is_empty())
    }

    /// Reports whether pods are queued whose sandboxes have to be resolved.
    pub fn has_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Resolves the sandboxes of the next `count` queued pods. `links` are the links of pods.
    pub async fn resolve_sandboxes(
        &mut self,
        resolver: &SenderResolver,
        netlink: &Netlink,
        links: &[&Link],
        count: usize,
    ) {
        if self.cgroup_tree.is_stale() {
            self.cgroup_tree.rescan();
        }
        for _ in 0..count {
            let Some(uid) = self.pending.pop_first() else { break };
            let Some(pod) = self.index.get(&uid) else { continue };
            if let Some(cgroups) = self.cgroup_tree.ambiguous(&pod.cgroup_uid) {
                let sandbox = Sandbox::ambiguous(pod, &cgroups);
                self.names_dirty |= self.sandboxes.insert(uid, sandbox.clone()) != Some(sandbox);
                continue;
            }
            let cgroups = self.cgroup_tree.of_pod(&pod.cgroup_uid);
            let mut found = resolver.from_pod(netlink, links, &cgroups, pod.host_network).await;
            if let (Some(found), Some(before)) = (&mut found, self.sandboxes.get(&uid)) {
                found.keep_if_unreadable(before);
            }
            log::debug!("pod {uid}: {found:?}");
            let before = match found.clone() {
                Some(sandbox) => self.sandboxes.insert(uid, sandbox),
                None => self.sandboxes.remove(&uid),
            };
            self.names_dirty |= before != found;
        }
    }

    /// Returns the time after which the next [`PodTracker::enqueue_changed`] is due, or `None` if no pod waits for its sandbox.
    /// The interval grows with the time since the last event.
    pub fn retry_delay(&self) -> Option<Duration> {
        let (shortest, longest) = RETRY_DELAYS;
        let needs_polling = self.unresolved().next().is_some() || !self.host_network_pods.is_empty();
        needs_polling.then(|| (self.last_change.elapsed() / 10).clamp(shortest, longest))
    }

    /// Returns the identities of the pods that a rule matches.
    pub fn senders(&self, rule: &config::PodSelector) -> IdentitySet {
        let mut senders = IdentitySet::default();
        match self.sync {
            Some(SyncState::Disabled) => senders.fail(
                "the pod watch is disabled: run in the cluster, or set kubernetes.enabled and kubernetes.kubeconfig",
            ),
            Some(SyncState::NotSynced) => senders.fail("the API server has not sent this node's pods yet"),
            None => {}
        }
        if let Some(failure) = self.namespace_failure(rule) {
            senders.fail(failure);
        }
        for pod in self.index.matching(rule) {
            if let Some(sandbox) = self.sandboxes.get(&pod.uid) {
                senders.extend(&sandbox.senders);
            }
        }
        senders
    }

    /// Reports whether [`PodTracker::names`] has to be written to the maps: it changed, and all pods are resolved.
    pub fn needs_name_sync(&self) -> bool {
        self.names_dirty && self.is_synced && !self.has_pending()
    }

    /// Returns the network namespaces of the pods: inode numbers by netns cookie, and the ID.
    pub fn namespaces(&self) -> impl Iterator<Item = (&BTreeMap<u64, u64>, Option<i32>)> {
        self.resolved().map(|(_, sandbox)| (&sandbox.senders.namespaces, sandbox.netns_id))
    }

    /// Returns the pod in the network namespace with this cookie.
    pub fn pod_in(&self, cookie: u64) -> Option<&Pod> {
        self.resolved().find(|(_, sandbox)| sandbox.senders.cookies.contains(&cookie)).map(|(pod, _)| pod)
    }

    /// Returns the pod and container behind each subject that the datapath knows.
    pub fn names(&self) -> BTreeMap<Subject, PodContainer<'_>> {
        let mut names = BTreeMap::new();
        for (pod, sandbox) in self.resolved() {
            let of_pod = PodContainer { pod, container: None };
            let IdentitySet { interfaces, cookies, .. } = &sandbox.senders;
            let interfaces = interfaces.iter().map(|&index| (SubjectKind::Interface, index.into()));
            let cookies = cookies.iter().map(|&cookie| (SubjectKind::Netns, cookie));
            names.extend(interfaces.chain(cookies).map(|(kind, id)| (Subject::new(kind, id), of_pod)));
            for &(id, ref container) in &sandbox.cgroups {
                let container = container.as_ref().and_then(|id| pod.containers.get(id));
                names.insert(Subject::new(SubjectKind::Cgroup, id), PodContainer { pod, container });
            }
        }
        names
    }

    fn resolved(&self) -> impl Iterator<Item = (&Pod, &Sandbox)> {
        self.index.active().filter_map(|pod| Some((pod, self.sandboxes.get(&pod.uid)?)))
    }

    fn unresolved(&self) -> impl Iterator<Item = &Pod> {
        self.index.active().filter(|pod| !self.sandboxes.contains_key(&pod.uid))
    }

    fn enqueue(&mut self, is_selected: impl Fn(&Sandbox) -> bool) {
        let matching = self.sandboxes.iter().filter(|(_, sandbox)| is_selected(sandbox));
        self.pending.extend(matching.map(|(uid, _)| uid.clone()));
    }

    fn enqueue_unresolved(&mut self) {
        let unresolved: Vec<_> = self.unresolved().map(|pod| pod.uid.clone()).collect();
        self.pending.extend(unresolved);
    }
}

/// Returns the error that interrupts a watch.
fn failure(state: Option<&WatchState>) -> Option<&Failure> {
    state.filter(|state| !state.connected)?.last_error.as_ref()
}
