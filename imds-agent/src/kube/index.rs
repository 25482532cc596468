//! Which pods there are, and which of them a rule means: pure, so that a test can tell it all.

use std::collections::{BTreeMap, BTreeSet};

use super::{pod::Pod, watch::PodEvent};
use crate::config::Pods;

/// Most pods that are known: far above what a node runs. Of others nothing is known, so that no rule means them.
pub const MOST_PODS: usize = 16_384;

/// The pods of this node that the API server has told of. What is not in here is not known.
#[derive(Clone, Debug, Default)]
pub struct Index {
    pods: BTreeMap<String, Pod>,
    /// Ids of pods by the id that their cgroups are named after.
    claims: BTreeMap<String, BTreeSet<String>>,
}

impl Index {
    /// Takes in one piece of news. Returns the ids of the pods that are new, gone, or others than before.
    pub fn handle(&mut self, event: PodEvent) -> BTreeSet<String> {
        match event {
            PodEvent::Relist(pods) => self.relist(pods),
            PodEvent::Apply(pod) => self.apply(pod).into_iter().collect(),
            PodEvent::Delete { uid } => self.delete(&uid).into_iter().collect(),
        }
    }

    /// All pods.
    pub fn pods(&self) -> impl Iterator<Item = &Pod> {
        self.pods.values()
    }

    /// The pod with this id.
    #[must_use]
    pub fn get(&self, uid: &str) -> Option<&Pod> {
        self.pods.get(uid)
    }

    /// The pods that may have processes. Not those whose cgroups another pod claims, too: whose they are can't be told, and
    /// one of them may have claimed them in bad faith.
    pub fn living(&self) -> impl Iterator<Item = &Pod> {
        let is_undisputed = |pod: &&Pod| self.claims.get(&pod.cgroup_uid).is_some_and(|pods| pods.len() == 1);
        self.pods.values().filter(|pod| !pod.is_over).filter(is_undisputed)
    }

    /// Those of the living that a rule means.
    pub fn meant<'i>(&'i self, rule: &'i Pods) -> impl Iterator<Item = &'i Pod> {
        self.living().filter(|pod| is_meant(pod, rule))
    }

    fn apply(&mut self, pod: Pod) -> Option<String> {
        let uid = pod.uid.clone();
        if self.pods.get(&uid) == Some(&pod) {
            return None;
        }
        self.delete(&uid);
        if self.pods.len() >= MOST_PODS {
            return None;
        }
        self.claims.entry(pod.cgroup_uid.clone()).or_default().insert(uid.clone());
        self.pods.insert(uid.clone(), pod);
        Some(uid)
    }

    fn delete(&mut self, uid: &str) -> Option<String> {
        let (uid, pod) = self.pods.remove_entry(uid)?;
        if let Some(pods) = self.claims.get_mut(&pod.cgroup_uid) {
            pods.remove(&uid);
            if pods.is_empty() {
                self.claims.remove(&pod.cgroup_uid);
            }
        }
        Some(uid)
    }

    /// These are all the pods there are.
    fn relist(&mut self, pods: Vec<Pod>) -> BTreeSet<String> {
        let present: BTreeSet<_> = pods.iter().map(|pod| pod.uid.clone()).collect();
        let gone: Vec<_> = self.pods.keys().filter(|uid| !present.contains(*uid)).cloned().collect();
        let mut changed: BTreeSet<_> = gone.iter().filter_map(|uid| self.delete(uid)).collect();
        changed.extend(pods.into_iter().filter_map(|pod| self.apply(pod)));
        changed
    }
}

fn is_meant(pod: &Pod, Pods { namespace, service_account, selector }: &Pods) -> bool {
    pod.namespace == *namespace
        && service_account.as_ref().is_none_or(|account| pod.service_account == *account)
        && selector.as_ref().is_none_or(|selector| selector.matches(&pod.labels))
}

#[cfg(test)]
mod tests;
