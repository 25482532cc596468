//! Who is exempt, as pods come and go.

use std::{future::pending, time::Duration};

use imds_ebpf_common::{Hook, Role};
use tokio::time::sleep;

use super::Guard;
use crate::{
    config::Exempt,
    datapath::DatapathError,
    exempt::Grants,
    kube::{PodEvent, WatchState},
    node::links::Link,
    pods::Pods,
};

/// How often it is asked for what the kernel sends no news of: names of network namespaces, and processes in cgroups.
const PERIOD: Duration = Duration::from_millis(250);

impl Guard {
    /// Waits until the rules may find others than they did.
    pub async fn exemptions_changed(&self) {
        loop {
            let of_rules = self.rules.are_to_be_asked().then_some(PERIOD);
            match of_rules.into_iter().chain(self.pods.pause()).min() {
                Some(pause) => sleep(pause).await,
                None => pending().await,
            }
            if self.rules.may_have_changed() || self.pods.have_moved() {
                return;
            }
        }
    }

    /// Grants what the rules say of the pods that are there, and takes the rest away.
    pub async fn restore_exemptions(&mut self) -> Result<(), DatapathError> {
        let wanted = self.find_exempt().await?;
        let writes = self.datapath.grant(&wanted)?;
        self.writes.exemptions += writes as u64;
        if writes > 0 {
            log::info!("{} exemptions are in force", wanted.len());
        }
        if self.pods.is_synced() {
            self.writes.pods += self.datapath.tell_names(&self.pods.names())? as u64;
        }
        Ok(())
    }

    /// Takes in what the API server tells of pods.
    pub async fn hear_of_pods(&mut self, event: PodEvent) -> Result<(), DatapathError> {
        if self.pods.handle(event) { self.restore_exemptions().await } else { Ok(()) }
    }

    /// Takes in how the watch of the pods of `node` goes.
    pub async fn hear_of_watch(&mut self, node: &str, state: &WatchState) -> Result<(), DatapathError> {
        if self.pods.take_in(state) {
            self.restore_exemptions().await?;
        }
        self.datapath.record_lookup(Some(&self.pods.lookup(node, state)))
    }

    /// No pods are looked up any more.
    pub async fn forget_cluster(&mut self) -> Result<(), DatapathError> {
        self.pods = Pods::new(false);
        self.keeps_grants = false;
        self.datapath.tell_names(&self.pods.names())?;
        self.datapath.record_lookup(None)?;
        self.restore_exemptions().await
    }

    /// Puts other rules in force, but takes nothing away before [`Guard::restore_exemptions`] does: what is granted by
    /// both is so at every moment between.
    pub(super) async fn change_rules(&mut self, rules: Vec<Exempt>) -> Result<(), DatapathError> {
        self.rules.set(rules);
        let mut either = self.datapath.granted()?;
        either.extend(self.find_exempt().await?);
        self.datapath.grant(&either).map(drop)
    }

    async fn find_exempt(&mut self) -> Result<Grants, DatapathError> {
        let pods: Vec<&Link> = self.links.values().filter(|link| self.role(link) == Role::Pod).collect();
        self.finder.keep(&self.links);
        let is_strict = self.kubepods.is_some();
        self.pods.follow_hosts(self.rules.of_pods().filter(|_| is_strict));
        self.pods.locate(&self.finder, &self.netlink, &pods).await;
        let judges_sockets = self.datapath.hooks().has(Hook::Socket);
        let found = self.rules.find(&mut self.finder, &self.netlink, &pods, &self.pods, judges_sockets);
        let mut wanted = found.await;
        if self.keeps_grants && !self.pods.is_synced() {
            // What an earlier agent knew stays until there is better knowledge. Cookies and ids of cgroups are never given
            // again, and an interface with another pod's index has lost what was granted to it.
            for (exemption, grant) in self.datapath.granted()? {
                if self.rules.mean_pods(grant.rule) {
                    wanted.entry(exemption).or_insert(grant);
                }
            }
        }
        Ok(wanted)
    }
}
