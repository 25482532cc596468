//! Which pods there are and what the operator's rules grant to each: pure, so that a test can tell it all.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{pod::Pod, watch::PodEvent};
use crate::config::{Exempt, Pods, Scope, Subject};

/// The pods of this node. What is not in here is not exempt.
#[derive(Clone, Debug)]
pub struct Index {
    rules: Vec<Exempt>,
    pods: BTreeMap<String, Entry>,
    /// Pods by the id that their cgroups are named after.
    claims: BTreeMap<String, BTreeSet<String>>,
}

/// What rules grant to a pod, all of them taken together. An endpoint that is in both is exempt: a rule that audits finds
/// what no other rule speaks of.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Exemption {
    /// The endpoints that it may reach.
    pub exempt: Scope,
    /// The endpoints for which it is judged as in audit mode.
    pub audited: Scope,
    /// Names of the rules that say so.
    pub rules: BTreeSet<String>,
}

impl Exemption {
    /// What a pod has of which no rule speaks.
    pub const NONE: Self = Self { exempt: Scope::NONE, audited: Scope::NONE, rules: BTreeSet::new() };

    /// Whether nothing is granted.
    #[must_use]
    pub fn is_none(&self) -> bool {
        self.exempt.is_none() && self.audited.is_none()
    }
}

/// What has become of one pod.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Change {
    /// The pod as it is, or as it was when it was last seen.
    pub pod: Arc<Pod>,
    /// Whether it is gone.
    pub is_gone: bool,
    /// What was granted to it before.
    pub before: Exemption,
    /// What is granted to it now: nothing when it is gone.
    pub after: Exemption,
}

#[derive(Clone, Debug)]
struct Entry {
    pod: Arc<Pod>,
    exemption: Exemption,
}

impl Index {
    /// An index without pods. Rules for other subjects than pods are left to others.
    #[must_use]
    pub fn new(rules: Vec<Exempt>) -> Self {
        Self { rules, pods: BTreeMap::new(), claims: BTreeMap::new() }
    }

    /// Takes in one piece of news.
    pub fn handle(&mut self, event: PodEvent) -> Vec<Change> {
        match event {
            PodEvent::Relist(pods) => self.relist(pods),
            PodEvent::Apply(pod) => self.apply(pod),
            PodEvent::Delete { uid } => self.delete(&uid),
        }
    }

    /// A pod is new, or another than before.
    pub fn apply(&mut self, pod: Pod) -> Vec<Change> {
        let (uid, claim) = (pod.uid.clone(), pod.cgroup_uid.clone());
        let before = self.pods.get(&uid);
        if before.is_some_and(|before| *before.pod == pod) {
            return Vec::new();
        }
        let given_up =
            before.map(|before| before.pod.cgroup_uid.clone()).filter(|given_up| *given_up != claim);
        let entry = Entry {
            pod: Arc::new(pod),
            exemption: before.map_or(Exemption::NONE, |before| before.exemption.clone()),
        };
        self.pods.insert(uid.clone(), entry);
        self.claims.entry(claim.clone()).or_default().insert(uid.clone());
        let mut changes = self.judge_claim(&claim, Some(&uid));
        if let Some(given_up) = given_up {
            self.disclaim(&given_up, &uid);
            changes.extend(self.judge_claim(&given_up, None));
        }
        changes
    }

    /// The pod with this id is gone.
    pub fn delete(&mut self, uid: &str) -> Vec<Change> {
        let Some(Entry { pod, exemption }) = self.pods.remove(uid) else { return Vec::new() };
        let claim = pod.cgroup_uid.clone();
        self.disclaim(&claim, uid);
        let mut changes = vec![Change { pod, is_gone: true, before: exemption, after: Exemption::NONE }];
        changes.extend(self.judge_claim(&claim, None));
        changes
    }

    /// These are all the pods there are.
    pub fn relist(&mut self, pods: Vec<Pod>) -> Vec<Change> {
        let present: BTreeSet<_> = pods.iter().map(|pod| pod.uid.as_str()).collect();
        let gone = self.pods.keys().filter(|uid| !present.contains(uid.as_str()));
        let gone: Vec<_> = gone.cloned().collect();
        // What is gone goes first, so that it is in nobody's way.
        let mut changes: Vec<_> = gone.iter().flat_map(|uid| self.delete(uid)).collect();
        changes.extend(pods.into_iter().flat_map(|pod| self.apply(pod)).collect::<Vec<_>>());
        changes
    }

    /// Other rules from now on.
    pub fn set_rules(&mut self, rules: Vec<Exempt>) -> Vec<Change> {
        self.rules = rules;
        let claims: Vec<_> = self.claims.keys().cloned().collect();
        claims.iter().flat_map(|claim| self.judge_claim(claim, None)).collect()
    }

    /// The pod with this id, and what is granted to it.
    #[must_use]
    pub fn get(&self, uid: &str) -> Option<(&Pod, &Exemption)> {
        self.pods.get(uid).map(|entry| (&*entry.pod, &entry.exemption))
    }

    /// The pod whose cgroups are named after this id; `None` where more than one claims to be.
    #[must_use]
    pub fn by_cgroup_uid(&self, uid: &str) -> Option<&Pod> {
        let claims = self.claims.get(uid)?;
        let only = claims.first().filter(|_| claims.len() == 1)?;
        self.pods.get(only).map(|entry| &*entry.pod)
    }

    /// All pods, and what is granted to each.
    pub fn pods(&self) -> impl Iterator<Item = (&Pod, &Exemption)> {
        self.pods.values().map(|entry| (&*entry.pod, &entry.exemption))
    }

    fn disclaim(&mut self, claim: &str, uid: &str) {
        if let Some(pods) = self.claims.get_mut(claim) {
            pods.remove(uid);
            if pods.is_empty() {
                self.claims.remove(claim);
            }
        }
    }

    /// Judges the pods anew whose cgroups go by the name `claim`; of `told`, there is news in any case.
    fn judge_claim(&mut self, claim: &str, told: Option<&str>) -> Vec<Change> {
        let Some(pods) = self.claims.get(claim) else { return Vec::new() };
        // Whose the cgroup is can't be told, and one of them may have claimed it in bad faith.
        let is_disputed = pods.len() > 1;
        let mut changes = Vec::new();
        for uid in pods {
            let Some(entry) = self.pods.get_mut(uid) else { continue };
            let after = if is_disputed { Exemption::NONE } else { judge(&entry.pod, &self.rules) };
            if entry.exemption != after || told == Some(uid) {
                let before = std::mem::replace(&mut entry.exemption, after.clone());
                changes.push(Change { pod: Arc::clone(&entry.pod), is_gone: false, before, after });
            }
        }
        changes
    }
}

/// What `rules` grant to `pod`.
fn judge(pod: &Pod, rules: &[Exempt]) -> Exemption {
    let mut exemption = Exemption::NONE;
    if pod.is_over {
        return exemption;
    }
    for Exempt { name, subject, endpoints, audit } in rules {
        let Subject::Pods(pods) = subject else { continue };
        if !is_meant(pod, pods) {
            continue;
        }
        let scope = if *audit { &mut exemption.audited } else { &mut exemption.exempt };
        *scope = std::mem::replace(scope, Scope::NONE).union(endpoints);
        exemption.rules.insert(name.clone());
    }
    exemption
}

fn is_meant(pod: &Pod, Pods { namespace, service_account, selector }: &Pods) -> bool {
    pod.namespace == *namespace
        && service_account.as_ref().is_none_or(|account| pod.service_account == *account)
        && selector.as_ref().is_none_or(|selector| selector.matches(&pod.labels))
}

#[cfg(test)]
mod tests;
