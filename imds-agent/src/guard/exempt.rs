//! Who is exempt, as pods come and go.

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

/// How often it is asked for what the kernel sends no news of: names of network namespaces, and processes in cgroups.
const PERIOD: Duration = Duration::from_millis(250);
/// How many sandboxes are looked for before news has its turn: a millisecond's worth.
const SANDBOXES_AT_ONCE: usize = 2;

impl Guard {
    /// Waits until the rules may find others than they did.
    pub async fn search_due(&self) {
        let of_rules = (self.rules.are_to_be_asked() || self.waits_for_plugins()).then_some(PERIOD);
        match of_rules.into_iter().chain(self.pods.pause()).min() {
            Some(pause) => sleep_until(self.last_search + pause).await,
            None => pending().await,
        }
    }

    /// Looks whether they do.
    pub async fn search_exempt(&mut self) -> Result<(), DatapathError> {
        self.last_search = Instant::now();
        self.release_started_pods().await;
        // What comes of it is for `locate_next`.
        self.pods.seek_moved();
        if self.rules.may_have_changed() { self.restore_exemptions().await } else { Ok(()) }
    }

    /// Whether there are pods whose sandboxes are to be looked for.
    #[must_use]
    pub fn is_locating(&self) -> bool {
        self.pods.are_sought()
    }

    /// Looks for the next ones; when that was the last, for who is exempt.
    pub async fn locate_next(&mut self) -> Result<(), DatapathError> {
        self.locate(SANDBOXES_AT_ONCE).await;
        if self.is_locating() {
            return Ok(());
        }
        let restored = self.restore_exemptions().await;
        self.record_lookup().and(restored)
    }

    /// Looks for the next `count` of them.
    pub(super) async fn locate(&mut self, count: usize) {
        let pods = of_pods(&self.links, &self.uplinks, &self.interfaces);
        self.pods.locate(&self.finder, &self.netlink, &pods, count).await;
    }

    /// Grants what the rules say of the pods that are there, and takes the rest away.
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

    /// Takes in what the API server tells of pods. Where they are is for [`Guard::locate_next`].
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

    /// Takes in how the watch of the pods of `node` goes.
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

    /// No pods are looked up any more.
    pub async fn forget_cluster(&mut self) -> Result<(), DatapathError> {
        self.pods = Pods::new(false);
        self.watched = None;
        self.keeps_grants = false;
        self.datapath.tell_names(&self.pods.names())?;
        self.record_lookup()?;
        self.restore_exemptions().await
    }

    /// Puts other rules in force, but takes nothing away before [`Guard::restore_exemptions`] does: what is granted by
    /// both is so at every moment between.
    pub(super) async fn change_rules(&mut self, rules: Vec<Exempt>) -> Result<(), DatapathError> {
        self.rules.set(rules);
        let mut either = self.datapath.granted()?;
        either.extend(self.find_exempt().await?);
        // Without room for both, the new rules must still take away what the old ones granted.
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
        // What comes of what all pods and their places are is better than what an earlier agent knew.
        self.keeps_grants &= self.is_locating() || !self.pods.is_synced();
        if self.keeps_grants {
            // What an earlier agent knew stays until there is better knowledge. Cookies and ids of cgroups are never given
            // again, and an interface with another pod's index has lost what was granted to it.
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

/// Returns the interfaces by which pods can send: those with `from_pod`. A route through a pod, as to an egress gateway, makes
/// its interface an uplink, and leaves it the pod's.
fn of_pods<'l>(links: &'l BTreeMap<u32, Link>, uplinks: &Uplinks, interfaces: &Interfaces) -> Vec<&'l Link> {
    let has_from_pod = |link: &&Link| assign(link, uplinks, interfaces, false).hooks.has(TcHook::FromPod);
    links.values().filter(has_from_pod).collect()
}
