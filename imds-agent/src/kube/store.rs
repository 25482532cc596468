//! Set of known pods and namespaces, and the pods that a rule matches. Pure, so that unit tests cover it completely.

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use super::{
    namespace::{NamespaceEvent, NamespaceIndex},
    pod::{Pod, PodEvent},
};
use crate::config::{NamespaceSelector, PodSelector};

/// Upper bound of known pods, far above what a node runs. Further pods are ignored, so no rule matches them.
pub const MAX_PODS: usize = 16_384;

/// Pods of this node that the API server has reported.
#[derive(Clone, Debug, Default)]
pub struct Index {
    pods: BTreeMap<String, Pod>,
    /// The UID that names the cgroup, and the pod's UID, for each pod in which they differ.
    claims: BTreeSet<(String, String)>,
    /// UIDs of cgroups that several pods claim, usually none.
    contested: BTreeSet<String>,
    namespaces: NamespaceIndex,
}

/// Names of claimants in a log line. A client of the API server may create any number of them.
const MAX_NAMES: usize = 3;

/// Cgroup that several pods claim.
#[derive(Clone, Debug)]
pub struct Dispute<'i> {
    /// Pod to which the cgroup is attributed.
    pub owner: Option<&'i Pod>,
    /// Other pods that claim the cgroup. The cgroup does not make them exempt.
    pub others: Vec<&'i Pod>,
}

impl fmt::Display for Dispute<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, Pod { namespace, name, .. }) in self.others.iter().take(MAX_NAMES).enumerate() {
            write!(f, "{}{namespace}/{name}", if number == 0 { "pod " } else { ", " })?;
        }
        if let Some(more) = self.others.len().checked_sub(MAX_NAMES).filter(|&more| more > 0) {
            write!(f, " and {more} more")?;
        }
        match self.owner {
            Some(Pod { namespace, name, .. }) => {
                write!(
                    f,
                    " claims the cgroup of the older static pod {namespace}/{name} with its annotations"
                )
            }
            None => write!(f, " claim the same cgroup with their annotations, and none is the oldest"),
        }
    }
}

impl Index {
    /// Applies an event. Returns the UIDs of the pods that are new, deleted or changed.
    pub fn handle(&mut self, event: PodEvent) -> BTreeSet<String> {
        match event {
            PodEvent::Relist(pods) => self.relist(pods),
            PodEvent::Apply(pod) => self.apply(pod).into_iter().collect(),
            PodEvent::Delete { key } => self.delete(&key).into_iter().collect(),
        }
    }

    /// Applies an event of a watch that reports the labels of namespaces with these `keys`. Returns whether it concerns
    /// known pods.
    pub fn handle_namespaces(&mut self, event: NamespaceEvent, keys: &BTreeSet<String>) -> bool {
        let changed = self.namespaces.handle(event, keys);
        self.pods.values().any(|pod| changed.contains(&pod.namespace))
    }

    /// Forgets all namespaces. Returns whether any was known.
    pub fn clear_namespaces(&mut self) -> bool {
        !std::mem::take(&mut self.namespaces).is_empty()
    }

    /// Returns the known namespaces.
    pub fn namespaces(&self) -> &NamespaceIndex {
        &self.namespaces
    }

    /// Returns all pods, including terminated ones.
    pub fn pods(&self) -> impl Iterator<Item = &Pod> {
        self.pods.values()
    }

    /// Returns the pod with this UID.
    pub fn get(&self, uid: &str) -> Option<&Pod> {
        self.pods.get(uid)
    }

    /// Returns the pods that may have processes. If several pods claim a cgroup, only its owner is included: see
    /// [`Index::disputes`].
    pub fn active(&self) -> impl Iterator<Item = &Pod> {
        let owns_cgroup = |pod: &&Pod| {
            !self.contested.contains(&pod.cgroup_uid)
                || self.owner(&pod.cgroup_uid).is_some_and(|owner| owner.uid == pod.uid)
        };
        self.pods.values().filter(|pod| !pod.is_terminated).filter(owns_cgroup)
    }

    /// Returns the cgroups that several pods claim.
    ///
    /// The cgroup of a static pod is named after an annotation of its mirror pod, which any client that may create pods
    /// can copy. The oldest object owns the cgroup: the kubelet creates the mirror pod when it starts the static pod,
    /// and the API server sets the creation time. A copy therefore neither removes an exemption nor gets one.
    pub fn disputes(&self) -> impl Iterator<Item = Dispute<'_>> {
        self.contested.iter().map(|cgroup| {
            let owner = self.owner(cgroup);
            let all = self.claimants(cgroup);
            let others = all.filter(|pod| owner.is_none_or(|owner| owner.uid != pod.uid)).collect();
            Dispute { owner, others }
        })
    }

    /// Returns the oldest of the pods that claim a cgroup, or `None` if two are equally old or no pod has a creation
    /// time.
    fn owner(&self, cgroup: &str) -> Option<&Pod> {
        let oldest = self.claimants(cgroup).filter_map(|pod| pod.created).min()?;
        let mut of_that_date = self.claimants(cgroup).filter(|pod| pod.created == Some(oldest));
        of_that_date.next().filter(|_| of_that_date.next().is_none())
    }

    fn claimants(&self, cgroup: &str) -> impl Iterator<Item = &Pod> {
        let named = self.pods.get(cgroup).filter(|pod| pod.cgroup_uid == cgroup);
        let claims = self.claims.range((cgroup.to_owned(), String::new())..);
        let claims = claims.take_while(move |(claimed, _)| claimed == cgroup);
        named.into_iter().chain(claims.filter_map(|(_, uid)| self.pods.get(uid)))
    }

    /// Returns the running pods that a rule matches.
    pub fn matching<'i>(&'i self, rule: &'i PodSelector) -> impl Iterator<Item = &'i Pod> {
        self.active().filter(|pod| self.is_selected(pod, rule))
    }

    fn apply(&mut self, pod: Pod) -> Option<String> {
        let uid = pod.uid.clone();
        if self.pods.get(&uid) == Some(&pod) {
            return None;
        }
        self.delete(&uid);
        if self.pods.len() >= MAX_PODS {
            return None;
        }
        let cgroup = pod.cgroup_uid.clone();
        if cgroup != uid {
            self.claims.insert((cgroup.clone(), uid.clone()));
        }
        self.pods.insert(uid.clone(), pod);
        self.update_contested(cgroup);
        Some(uid)
    }

    fn delete(&mut self, uid: &str) -> Option<String> {
        let (uid, pod) = self.pods.remove_entry(uid)?;
        let claim = (pod.cgroup_uid, uid);
        self.claims.remove(&claim);
        let (cgroup, uid) = claim;
        self.update_contested(cgroup);
        Some(uid)
    }

    fn update_contested(&mut self, cgroup: String) {
        if self.claimants(&cgroup).nth(1).is_some() {
            self.contested.insert(cgroup);
        } else {
            self.contested.remove(&cgroup);
        }
    }

    /// Replaces the set of pods. Returns the UIDs of the pods that are new, deleted or changed.
    fn relist(&mut self, pods: Vec<Pod>) -> BTreeSet<String> {
        let present: BTreeSet<_> = pods.iter().map(|pod| pod.uid.clone()).collect();
        let gone: Vec<_> = self.pods.keys().filter(|uid| !present.contains(*uid)).cloned().collect();
        let mut changed: BTreeSet<_> = gone.iter().filter_map(|uid| self.delete(uid)).collect();
        changed.extend(pods.into_iter().filter_map(|pod| self.apply(pod)));
        changed
    }

    fn is_selected(
        &self,
        pod: &Pod,
        PodSelector { namespace, service_account, selector }: &PodSelector,
    ) -> bool {
        let is_in_namespace = match namespace {
            NamespaceSelector::Name(name) => pod.namespace == *name,
            NamespaceSelector::Labels(labels) => self.namespaces.matches(&pod.namespace, labels),
        };
        is_in_namespace
            && service_account.as_ref().is_none_or(|account| pod.service_account == *account)
            && selector.as_ref().is_none_or(|selector| selector.matches(|key| pod.labels.get(key)))
    }
}
