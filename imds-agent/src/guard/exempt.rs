//! Keeps the exemptions current while pods and links come and go.

use std::{collections::BTreeMap, future::pending, time::Duration};

use imds_ebpf_common::{Hook, TcHook};
use tokio::time::{Instant, sleep_until};

use super::Guard;
use crate::{
    config::{Exempt, Interfaces},
    datapath::DatapathError,
    exempt::Grants,
    kube::{PodEvent, WatchState},
    node::{links::Link, netns},
    pods::Pods,
    state::{Uplinks, assign},
};

/// Poll interval for changes that the kernel does not report: names of network namespaces, and members of cgroups.
const PERIOD: Duration = Duration::from_millis(250);
/// Sandboxes to resolve before events are handled again: about 1 ms of work.
const SANDBOXES_AT_ONCE: usize = 2;

impl Guard {
    /// Waits until the next poll for changes that the kernel does not report.
    pub async fn search_due(&self) {
        let of_rules = (self.rules.are_to_be_asked() || self.waits_for_plugins()).then_some(PERIOD);
        match of_rules.into_iter().chain(self.pods.pause()).min() {
            Some(pause) => sleep_until(self.last_search + pause).await,
            None => pending().await,
        }
    }

    /// Polls for changes of network namespaces, cgroups and sandboxes, and updates the exemptions.
    pub async fn search_exempt(&mut self) -> Result<(), DatapathError> {
        self.last_search = Instant::now();
        self.release_started_pods().await;
        // Only queues the pods: `locate_next` resolves their sandboxes.
        self.pods.seek_moved();
        if self.rules.may_have_changed() { self.restore_exemptions().await } else { Ok(()) }
    }

    /// Reports whether pods are queued whose sandboxes have to be resolved.
    #[must_use]
    pub fn is_locating(&self) -> bool {
        self.pods.are_sought()
    }

    /// Resolves the next sandboxes. Recomputes the exemptions after the last one.
    pub async fn locate_next(&mut self) -> Result<(), DatapathError> {
        self.locate(SANDBOXES_AT_ONCE).await;
        if self.is_locating() {
            return Ok(());
        }
        let restored = self.restore_exemptions().await;
        self.record_lookup().and(restored)
    }

    /// Resolves the sandboxes of the next `count` queued pods.
    pub(super) async fn locate(&mut self, count: usize) {
        let pods = of_pods(&self.links, &self.uplinks, &self.interfaces);
        self.pods.locate(&self.finder, &self.netlink, &pods, count).await;
    }

    /// Computes the exemptions of the pods on this node, and updates the maps to match.
    pub async fn restore_exemptions(&mut self) -> Result<(), DatapathError> {
        let wanted = self.find_exempt().await?;
        let writes = self.datapath.grant(&wanted)?;
        self.writes.exemptions += writes as u64;
        if writes > 0 {
            log::info!("updated exemptions: {} active", wanted.entries.len());
        }
        if self.pods.are_to_be_told() {
            self.writes.pods += self.datapath.tell_names(&self.pods.names())? as u64;
            self.pods.were_told();
        }
        Ok(())
    }

    /// Handles an event of the pod watch. [`Guard::locate_next`] resolves the sandboxes of new pods.
    pub async fn hear_of_pods(&mut self, event: PodEvent) -> Result<(), DatapathError> {
        let disputed = self.pods.disputed();
        if !self.pods.handle(event) {
            return Ok(());
        }
        if self.watched.is_some() && self.pods.disputed() != disputed {
            self.record_lookup()?;
        }
        self.restore_exemptions().await
    }

    /// Handles a state change of the watch of the pods of `node`.
    pub async fn hear_of_watch(&mut self, node: &str, state: &WatchState) -> Result<(), DatapathError> {
        if self.pods.take_in(state) {
            self.restore_exemptions().await?;
        }
        self.watched = Some((node.to_owned(), state.clone()));
        self.record_lookup()
    }

    fn record_lookup(&mut self) -> Result<(), DatapathError> {
        let lookup = self.watched.as_ref().map(|(node, state)| self.pods.lookup(node, state));
        self.datapath.record_lookup(lookup.as_ref())
    }

    /// Drops all pods and their exemptions, after the pod watch was disabled.
    pub async fn forget_cluster(&mut self) -> Result<(), DatapathError> {
        self.pods = Pods::new(false);
        self.watched = None;
        self.keeps_grants = false;
        self.datapath.tell_names(&self.pods.names())?;
        self.record_lookup()?;
        self.restore_exemptions().await
    }

    /// Applies other rules. Exemptions of the old rules are removed only by [`Guard::restore_exemptions`], so that an
    /// exemption that both old and new rules contain is never interrupted.
    pub(super) async fn change_rules(&mut self, rules: Vec<Exempt>) -> Result<(), DatapathError> {
        self.rules.set(rules);
        let mut either = self.datapath.granted()?;
        either.extend(self.find_exempt().await?);
        // If the map has no room for both, the new rules must still revoke the exemptions of the old ones.
        if let Err(error) = self.datapath.grant(&either) {
            log::warn!("failed to keep all exemptions during the reload: {:#}", anyhow::Error::from(error));
        }
        Ok(())
    }

    async fn find_exempt(&mut self) -> Result<Grants, DatapathError> {
        let pods = of_pods(&self.links, &self.uplinks, &self.interfaces);
        self.finder.keep(&self.links);
        let is_strict = self.kubepods.is_some();
        self.pods.follow_hosts(self.rules.of_pods().filter(|_| is_strict));
        let judges_sockets = self.datapath.hooks().has(Hook::Socket);
        let found = self.rules.find(&mut self.finder, &self.netlink, &pods, &self.pods, judges_sockets);
        let mut wanted = found.await;
        wanted.add_bridges(&self.links);
        if !self.datapath.hooks().has(Hook::FromPod) && !wanted.entries.is_empty() {
            wanted.add_node(netns::addresses().unwrap_or_default());
        }
        // Once all pods are synced and resolved, the recomputed exemptions replace those of the previous agent.
        self.keeps_grants &= self.is_locating() || !self.pods.is_synced();
        if self.keeps_grants {
            // Until then, the exemptions of the previous agent stay. The kernel never reuses a netns cookie or cgroup
            // id, and an interface that reuses the index of a deleted one has lost its exemptions already.
            let granted = self.datapath.granted()?;
            for (exemption, grant) in granted.entries {
                if self.rules.mean_pods(grant.rule) {
                    wanted.entries.entry(exemption).or_insert(grant);
                }
            }
            wanted.sources.extend(granted.sources);
        }
        Ok(wanted)
    }
}

/// Returns the interfaces from which pods can send: those with `from_pod`. A route through a pod, for example to an
/// egress gateway, makes the pod's interface an uplink, but it remains a pod interface.
fn of_pods<'l>(links: &'l BTreeMap<u32, Link>, uplinks: &Uplinks, interfaces: &Interfaces) -> Vec<&'l Link> {
    let has_from_pod = |link: &&Link| assign(link, uplinks, interfaces, false).hooks.has(TcHook::FromPod);
    links.values().filter(has_from_pod).collect()
}
