//! `on_deny = "explain"`: listeners that allow no request, in the network namespaces of all other pods that are denied.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use imds_ebpf_common::{
    Address, DenyAction, ExemptionKey, Mode, RedirectRecord, Role, Subject, SubjectKind,
    redirect::MAX_LISTENERS,
};

use super::{
    Reconciler,
    scoped::ScopedState,
    scoped_rules::{DesiredListener, DesiredListeners, Endpoints},
};
use crate::{
    encode::address_key,
    node::{link::Link, pod_namespaces::PodNamespaces},
};

/// Pods whose denials are explained.
#[derive(Debug, Default)]
pub(super) struct ExplainedPods {
    namespaces: PodNamespaces,
    /// Inode numbers of the network namespaces, by netns cookie.
    found: BTreeMap<u64, u64>,
}

impl Reconciler {
    /// Reports whether denied pods get an explanation, if they can have a listener.
    pub(super) fn explains(&self) -> bool {
        self.exemptions.on_deny == DenyAction::Explain
            && self.exemptions.mode == Mode::Enforce
            && !self.exemptions.endpoints.explained.is_empty()
            && self.redirect_obstacle().is_none()
    }

    /// Searches the network namespaces of pods again, if denials are explained.
    pub(super) async fn find_explained_pods(&mut self) {
        if !self.explains() {
            self.scoped.explained = ExplainedPods::default();
            return;
        }
        let (mut found, mut known) = (BTreeMap::new(), BTreeSet::new());
        for (namespaces, id) in self.exemptions.pods.namespaces() {
            found.extend(namespaces);
            known.extend(id);
        }
        // The role leaves out uplinks: if the node itself is a container, the peer of its uplink is in a namespace outside of it.
        let is_pods = |link: &&Link| {
            link.peer_netns.is_some_and(|id| !known.contains(&id)) && self.assign(link).role == Role::Pod
        };
        let links: Vec<_> = self.node.links.values().filter(is_pods).collect();
        let explained = &mut self.scoped.explained;
        found.extend(explained.namespaces.update(&self.netlink, &links).await);
        if explained.found != found {
            explained.found = found;
            self.merge_listeners();
        }
    }

    /// Sets the desired listeners to those of the rules, and those that explain denials.
    pub(super) fn merge_listeners(&mut self) {
        let explains = self.explains();
        let ScopedState { desired, of_rules, exempt, explained, .. } = &mut self.scoped;
        desired.clone_from(of_rules);
        if explains {
            add_explained(desired, &explained.found, exempt, &self.exemptions.endpoints);
        }
    }
}

/// Adds a listener that explains denials for each namespace and endpoint without a listener or an exemption. The oldest namespaces
/// come first, which have the smallest cookies.
fn add_explained(
    desired: &mut DesiredListeners,
    namespaces: &BTreeMap<u64, u64>,
    exempt: &BTreeSet<ExemptionKey>,
    Endpoints { explained, provider, .. }: &Endpoints,
) {
    for (&cookie, &inode) in namespaces {
        let subject = Subject::new(SubjectKind::Netns, cookie);
        let is_exempt = |address| exempt.contains(&ExemptionKey { address, subject });
        for &endpoint in explained {
            if desired.len() >= MAX_LISTENERS {
                return;
            }
            if !is_exempt(Address::ANY) && !is_exempt(address_key(endpoint)) {
                desired
                    .entry((cookie, endpoint))
                    .or_insert_with(|| DesiredListener::explaining(inode, provider));
            }
        }
    }
}

impl DesiredListener {
    fn explaining(inode: u64, provider: &'static str) -> Self {
        Self { inode, provider, rule: RedirectRecord::EXPLAINS, rules: 0, allow: Arc::default() }
    }

    /// Reports whether the listener allows no request, and explains denials.
    pub(super) fn explains(&self) -> bool {
        self.rule == RedirectRecord::EXPLAINS
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    const ONE: [u8; 4] = [10, 0, 0, 1];
    const OTHER: [u8; 4] = [10, 0, 0, 2];

    fn explained(desired: &mut DesiredListeners, count: u64, exempt: &[ExemptionKey]) -> Vec<(u64, IpAddr)> {
        let namespaces = (1..=count).map(|cookie| (cookie, cookie + 100)).collect();
        let addresses = [ONE, OTHER].map(IpAddr::from);
        let endpoints =
            Endpoints { addresses: addresses.into(), explained: addresses.into(), provider: "azure" };
        add_explained(desired, &namespaces, &exempt.iter().copied().collect(), &endpoints);
        desired.iter().filter(|(_, listener)| listener.explains()).map(|(key, _)| *key).collect()
    }

    #[test]
    fn rules_and_exemptions_win() {
        let [one, other] = [ONE, OTHER].map(IpAddr::from);
        assert_eq!(explained(&mut DesiredListeners::new(), 1, &[]), [(1, one), (1, other)]);
        let of_rule = DesiredListener {
            inode: 101,
            provider: "azure",
            rule: 1,
            rules: 1,
            allow: Arc::new(["GET /a".to_owned()].into()),
        };
        let mut desired = DesiredListeners::from([((1, one), of_rule.clone())]);
        let key =
            |address, cookie| ExemptionKey { address, subject: Subject::new(SubjectKind::Netns, cookie) };
        let exempt = [key(Address::ANY, 2), key(Address::from_ipv4(OTHER), 3)];
        assert_eq!(explained(&mut desired, 3, &exempt), [(1, other), (3, one)]);
        assert_eq!(desired[&(1, one)], of_rule);
    }

    #[test]
    fn listeners_have_a_limit() {
        let mut desired = DesiredListeners::new();
        let listeners = explained(&mut desired, 1000, &[]);
        assert_eq!((listeners.len(), listeners.last().unwrap().0), (MAX_LISTENERS, 512));
        assert_eq!(explained(&mut desired, 2000, &[]).len(), MAX_LISTENERS);
    }
}
