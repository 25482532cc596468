//! Keeps the exemptions current while pods and links come and go.

use std::{
    collections::{BTreeMap, BTreeSet},
    future::pending,
    io,
    net::IpAddr,
    time::Duration,
};

use imds_ebpf_common::{
    DenyAction, ExemptionKey, ExemptionRecord, Hook, Mode, RedirectRecord, Subject, SubjectKind, TcHook,
    Verdict,
};
use tokio::time::{Instant, sleep_until};

use super::Reconciler;
use crate::{
    config::{Exempt, Interfaces},
    controller::{
        exemption_rules::ExemptionRules,
        pod_tracker::PodTracker,
        resolved_config::ResolvedConfig,
        scoped_rules::{Endpoints, NO_BROKER, NO_SOCKET_HOOK, RuleContext},
    },
    datapath::{DatapathError, exemption_set::ExemptionSet, maps::config_record::EXPLAIN},
    encode::address_key,
    kube::{NamespaceEvent, PodEvent, WatchState},
    node::{
        interface_role::{Uplinks, assign},
        link::Link,
        netns,
        sender_resolver::SenderResolver,
    },
};

/// Poll interval for changes that the kernel does not report: names of network namespaces, and members of cgroups.
const PERIOD: Duration = Duration::from_millis(250);
/// Sandboxes to resolve before events are handled again: about 1 ms of work.
const SANDBOX_BATCH: usize = 2;
/// Number in the map of exemptions for the broker, which no rule of the configuration exempts.
const BROKER_RULE: u32 = 0;

/// Exemption rules, and the pods and identities that they match.
pub(super) struct ExemptionState {
    /// Exemption rules of the configuration.
    pub(super) rules: ExemptionRules,
    /// Resolves a rule to the identities of the senders that it exempts.
    pub(super) resolver: SenderResolver,
    pub(super) pods: PodTracker,
    /// Name of the node in the cluster and state of its pod watch, if Kubernetes is used.
    pub(super) watched: Option<(String, WatchState)>,
    /// Time of the last poll for changes that the kernel does not report.
    pub(super) last_search: Instant,
    /// The last recorded text of [`ExemptionRules::describe_errors`]. An earlier agent may have recorded another one.
    recorded_errors: Option<String>,
    /// True until the first pod sync if the previous agent ran with this configuration: its exemptions for pods are
    /// then kept.
    pub(super) retain_previous_exemptions: bool,
    /// Links have changed since exemptions were computed.
    pub(super) dirty: bool,
    /// The node's own addresses, by which masqueraded packets and those that return from an ifb device are recognized.
    node_addresses: LastRead,
    /// True if the maps contain the node's addresses.
    pub(super) uses_node_addresses: bool,
    /// Protected endpoints, for scoped exemptions.
    pub(super) endpoints: Endpoints,
    /// Effective mode.
    pub(super) mode: Mode,
    /// Effective reply to denied pods.
    pub(super) on_deny: DenyAction,
}

/// Addresses that were read last.
#[derive(Debug, Default)]
struct LastRead(BTreeSet<IpAddr>);

impl LastRead {
    /// Replaces the addresses by those that were read. After an error they stay, because exempt pods need them.
    fn update(&mut self, read: io::Result<BTreeSet<IpAddr>>) -> impl Iterator<Item = IpAddr> {
        match read {
            Ok(addresses) => self.0 = addresses,
            Err(error) => log::warn!("failed to read the node's addresses, keeping the last ones: {error}"),
        }
        self.0.iter().copied()
    }
}

impl ExemptionState {
    /// Returns the state before any pod is known.
    pub(super) fn new(
        ResolvedConfig { datapath_config, endpoint_set, exempt, cluster, .. }: &ResolvedConfig,
        resolver: SenderResolver,
    ) -> Self {
        Self {
            rules: ExemptionRules::new(exempt.clone()),
            resolver,
            pods: PodTracker::new(cluster.is_some()),
            endpoints: endpoint_set.into(),
            mode: datapath_config.mode,
            on_deny: datapath_config.on_deny,
            watched: None,
            last_search: Instant::now(),
            recorded_errors: None,
            retain_previous_exemptions: false,
            dirty: false,
            node_addresses: LastRead::default(),
            uses_node_addresses: false,
        }
    }
}

impl Reconciler {
    /// Waits until the next poll for changes that the kernel does not report.
    pub async fn search_due(&self) {
        let polls = self.exemptions.rules.need_polling()
            || self.node_processes.has_cgroups()
            || self.attaching.queue.delayed().next().is_some();
        let of_rules = polls.then_some(PERIOD);
        match of_rules.into_iter().chain(self.exemptions.pods.retry_delay()).min() {
            Some(retry_delay) => sleep_until(self.exemptions.last_search + retry_delay).await,
            None => pending().await,
        }
    }

    /// Polls for changes of network namespaces, cgroups and sandboxes, and updates the exemptions.
    pub async fn poll_exemptions(&mut self) -> Result<(), DatapathError> {
        self.exemptions.last_search = Instant::now();
        self.release_started_pods().await;
        // Only queues the pods: `resolve_next` resolves their sandboxes.
        self.exemptions.pods.enqueue_changed();
        let followed = self.update_node_allow();
        if self.exemptions.rules.may_have_changed() {
            self.reconcile_exemptions().await?;
        }
        followed
    }

    /// Reports whether pods are queued whose sandboxes have to be resolved.
    pub fn is_resolving(&self) -> bool {
        self.exemptions.pods.has_pending()
    }

    /// Resolves the next sandboxes. Recomputes the exemptions after the last one.
    pub async fn resolve_next(&mut self) -> Result<(), DatapathError> {
        self.resolve_sandboxes(SANDBOX_BATCH).await;
        if self.is_resolving() {
            return Ok(());
        }
        let restored = self.reconcile_exemptions().await;
        self.record_watch_status().and(restored)
    }

    /// Resolves the sandboxes of the next `count` queued pods.
    pub(super) async fn resolve_sandboxes(&mut self, count: usize) {
        let pods = pod_links(&self.node.links, &self.node.uplinks, &self.interfaces);
        self.exemptions.pods.resolve_sandboxes(&self.exemptions.resolver, &self.netlink, &pods, count).await;
    }

    /// Computes the exemptions of the pods on this node, and updates the maps to match.
    pub async fn reconcile_exemptions(&mut self) -> Result<(), DatapathError> {
        let desired = self.resolve_exemptions().await?;
        let listeners = self.reconcile_listeners();
        let map_updates = self.datapath.sync_exemptions(&desired)?;
        self.map_updates.exemptions += map_updates as u64;
        if map_updates > 0 {
            log::info!("updated exemptions: {} active", desired.entries.len());
        }
        if self.exemptions.pods.needs_name_sync() {
            self.map_updates.pods += self.datapath.sync_pod_names(&self.exemptions.pods.names())? as u64;
            self.exemptions.pods.names_dirty = false;
        }
        listeners
    }

    /// Handles an event of the pod watch. [`Reconciler::resolve_next`] resolves the sandboxes of new pods.
    pub async fn on_pod_event(&mut self, event: PodEvent) -> Result<(), DatapathError> {
        let disputed = self.exemptions.pods.disputed;
        if !self.exemptions.pods.on_pod_event(event) {
            return Ok(());
        }
        if self.exemptions.watched.is_some() && self.exemptions.pods.disputed != disputed {
            self.record_watch_status()?;
        }
        self.reconcile_exemptions().await
    }

    /// Handles an event of the namespace watch, which reports the labels with these keys.
    pub async fn on_namespace_event(
        &mut self,
        event: NamespaceEvent,
        label_keys: &BTreeSet<String>,
    ) -> Result<(), DatapathError> {
        let is_changed = self.exemptions.pods.on_namespace_event(event, label_keys);
        if is_changed { self.reconcile_exemptions().await } else { Ok(()) }
    }

    /// Handles a state change of the namespace watch.
    pub async fn on_namespace_watch_status(&mut self, state: WatchState) -> Result<(), DatapathError> {
        if self.exemptions.pods.on_namespace_watch_status(state) {
            self.reconcile_exemptions().await?;
        }
        self.record_watch_status()
    }

    /// Forgets all namespaces, after the namespace watch was stopped.
    pub fn clear_namespaces(&mut self) -> Result<(), DatapathError> {
        if self.exemptions.pods.clear_namespaces() { self.record_watch_status() } else { Ok(()) }
    }

    /// Handles a state change of the watch of the pods of `node`.
    pub async fn on_watch_status(&mut self, node: &str, state: &WatchState) -> Result<(), DatapathError> {
        if self.exemptions.pods.on_watch_status(state) {
            self.reconcile_exemptions().await?;
        }
        self.exemptions.watched = Some((node.to_owned(), state.clone()));
        self.record_watch_status()
    }

    fn record_watch_status(&mut self) -> Result<(), DatapathError> {
        let watch_status = self
            .exemptions
            .watched
            .as_ref()
            .map(|(node, state)| self.exemptions.pods.watch_status(node, state));
        self.datapath.record_watch_status(watch_status.as_ref())
    }

    /// Drops all pods and their exemptions, after the pod watch was disabled.
    pub async fn clear_pods(&mut self) -> Result<(), DatapathError> {
        self.exemptions.pods = PodTracker::new(false);
        self.exemptions.watched = None;
        self.exemptions.retain_previous_exemptions = false;
        self.datapath.sync_pod_names(&self.exemptions.pods.names())?;
        self.record_watch_status()?;
        self.reconcile_exemptions().await
    }

    /// Applies other rules. Exemptions of the old rules are removed only by [`Reconciler::reconcile_exemptions`], so that an
    /// exemption that both old and new rules contain is never interrupted.
    pub(super) async fn change_rules(&mut self, rules: Vec<Exempt>) -> Result<(), DatapathError> {
        self.exemptions.rules.set(rules);
        let mut either = self.datapath.exemptions()?;
        either.extend(self.resolve_exemptions().await?);
        // If the map has no room for both, the new rules must still revoke the exemptions of the old ones.
        if let Err(error) = self.datapath.sync_exemptions(&either) {
            log::warn!("failed to keep all exemptions during the reload: {:#}", anyhow::Error::from(error));
        }
        Ok(())
    }

    pub(super) fn redirect_obstacle(&self) -> Option<&'static str> {
        if self.scoped.broker.is_none() {
            return Some(NO_BROKER);
        }
        (!self.datapath.can_redirect()).then_some(NO_SOCKET_HOOK)
    }

    async fn resolve_exemptions(&mut self) -> Result<ExemptionSet, DatapathError> {
        let pods = pod_links(&self.node.links, &self.node.uplinks, &self.interfaces);
        self.exemptions.resolver.retain(&self.node.links);
        let tracks_host_network = self.kubepods.is_some() || self.datapath.hooks().contains(Hook::NodeAllow);
        self.exemptions
            .pods
            .track_host_network_pods(self.exemptions.rules.pod_selectors().filter(|_| tracks_host_network));
        let context = RuleContext {
            socket_hook_on: self.datapath.hooks().contains(Hook::Socket)
                && !self.datapath.lacks_identity(Hook::Socket),
            redirect_obstacle: self.redirect_obstacle(),
            is_enforcing: self.exemptions.mode == Mode::Enforce,
            endpoints: self.exemptions.endpoints.clone(),
        };
        let found = self.exemptions.rules.resolve(
            &mut self.exemptions.resolver,
            &self.netlink,
            &pods,
            &self.exemptions.pods,
            &context,
        );
        let (mut desired, listeners) = found.await;
        self.scoped.of_rules = listeners;
        self.scoped.exempt = desired.netns().collect();
        self.merge_listeners();
        self.record_rule_errors()?;
        self.add_broker(&mut desired);
        desired.add_bridges(&self.node.links);
        let returns_packets = self.node.links.values().any(Link::may_return_packets);
        self.exemptions.uses_node_addresses = returns_packets || !desired.entries.is_empty();
        if self.exemptions.uses_node_addresses {
            desired.add_node_addresses(self.exemptions.node_addresses.update(netns::addresses()));
        }
        // Once all pods are synced and resolved, and all namespaces are known, the recomputed exemptions replace those of
        // the previous agent.
        let is_incomplete = self.is_resolving() || !self.exemptions.pods.is_synced;
        let ExemptionState { rules, pods, retain_previous_exemptions, .. } = &mut self.exemptions;
        let is_open = |selector| is_incomplete || !pods.knows_namespaces(selector);
        *retain_previous_exemptions &= is_incomplete || rules.pod_selectors().any(is_open);
        if *retain_previous_exemptions {
            // Until then, the exemptions of the previous agent stay. The kernel never reuses a netns cookie or cgroup
            // id, and an interface that reuses the index of a deleted one has lost its exemptions already.
            let previous = self.datapath.exemptions()?;
            for (exemption, record) in previous.entries {
                if rules.pod_selector(record.rule).is_some_and(is_open) {
                    desired.entries.entry(exemption).or_insert(record);
                }
            }
            desired.sources.extend(previous.sources);
        }
        if returns_packets {
            desired.add_passed_sources();
        }
        Ok(desired)
    }

    /// Exempts the broker from `hooks.host_network`, if it runs in a pod, at the endpoints that it asks for pods.
    fn add_broker(&mut self, desired: &mut ExemptionSet) {
        let Some(cgroup) = self.broker_cgroup() else { return };
        let endpoints: BTreeSet<_> = self.scoped.of_rules.keys().map(|(_, endpoint)| *endpoint).collect();
        for endpoint in endpoints {
            let subject = Subject::new(SubjectKind::Cgroup, cgroup);
            let exemption = ExemptionKey { address: address_key(endpoint), subject };
            desired.entries.insert(exemption, ExemptionRecord::new(Verdict::Exempt, BROKER_RULE));
        }
    }

    /// Records the rules that cannot be applied completely, if they have changed.
    pub(super) fn record_rule_errors(&mut self) -> Result<(), DatapathError> {
        let errors = ExemptionRules::describe_errors(&self.rule_errors());
        if self.exemptions.recorded_errors.as_ref() != Some(&errors) {
            self.datapath.record_exemption_errors(&errors)?;
            self.exemptions.recorded_errors = Some(errors);
        }
        Ok(())
    }

    /// Returns the reasons why rules cannot be applied completely, by name of the rule.
    pub(super) fn rule_errors(&self) -> BTreeMap<String, String> {
        let ExemptionRules { exempt, errors, .. } = &self.exemptions.rules;
        let mut errors = errors.clone();
        for (number, error) in self.scoped.errors() {
            let rule = (number as usize).checked_sub(1).and_then(|index| exempt.get(index));
            let explain = (number == RedirectRecord::EXPLAINS).then_some(EXPLAIN);
            if let Some(subject) = rule.map(|rule| rule.name.as_str()).or(explain) {
                errors.entry(subject.to_owned()).or_insert(error);
            }
        }
        errors
    }

    /// Adds the node's addresses to those that the datapath knows, so that the first `node_egress` program already
    /// recognizes packets of the node that pass it a second time.
    pub(super) fn add_node_sources(&mut self) -> Result<(), DatapathError> {
        let mut either = self.datapath.exemptions()?;
        either.add_node_addresses(self.exemptions.node_addresses.update(netns::addresses()));
        either.add_passed_sources();
        self.datapath.sync_exemptions(&either)?;
        Ok(())
    }
}

/// Returns the interfaces from which pods can send: those with `from_pod`. A route through a pod, for example to an
/// egress gateway, makes the pod's interface an uplink, but it remains a pod interface.
fn pod_links<'l>(
    links: &'l BTreeMap<u32, Link>,
    uplinks: &Uplinks,
    interfaces: &Interfaces,
) -> Vec<&'l Link> {
    let has_from_pod =
        |link: &&Link| assign(link, uplinks, interfaces, false).hooks.contains(TcHook::FromPod);
    links.values().filter(has_from_pod).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unreadable_addresses_stay() {
        let mut addresses = LastRead::default();
        let [first, second]: [IpAddr; 2] = [[10, 0, 0, 1].into(), [10, 0, 0, 2].into()];
        let failed = || Err(io::Error::from_raw_os_error(libc::EMFILE));
        assert_eq!(addresses.update(failed()).next(), None);
        assert!(addresses.update(Ok([first].into())).eq([first]));
        assert!(addresses.update(failed()).eq([first]));
        assert!(addresses.update(Ok([second].into())).eq([second]));
    }
}
