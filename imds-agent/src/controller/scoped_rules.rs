//! Scoped exemptions: the listeners that the rules need on this node.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use imds_ebpf_common::{Address, ExemptionKey, ExemptionRecord, Subject, SubjectKind};

use crate::{
    config::{EndpointSelector, Exempt, endpoint_set::EndpointSet, provider::Provider},
    datapath::maps::redirect_maps::RedirectKey,
    encode::address_key,
    node::sender_resolver::IdentitySet,
};

/// Properties of the node that decide how rules are applied.
#[derive(Clone, Debug)]
pub(super) struct RuleContext {
    /// The socket hook is on.
    pub(super) socket_hook_on: bool,
    /// Reason why no connection can be redirected to a broker.
    pub(super) redirect_obstacle: Option<&'static str>,
    /// The mode is `enforce`. In other modes no request is denied that the broker would have to answer.
    pub(super) is_enforcing: bool,
    pub(super) endpoints: Endpoints,
}

/// Listeners by network namespace and endpoint.
pub(super) type DesiredListeners = BTreeMap<RedirectKey, DesiredListener>;

/// Listener that a pod should have for an endpoint.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct DesiredListener {
    /// Inode number of the pod's network namespace.
    pub(super) inode: u64,
    /// Provider of the endpoint.
    pub(super) provider: &'static str,
    /// Number of the first rule that matches the pod, from 1, and of the rules that match.
    pub(super) rule: u32,
    pub(super) rules: u32,
    /// Requests that any of these rules allows. Listeners of the same rules share the list, which is most of their memory.
    pub(super) allow: Arc<BTreeSet<String>>,
}

/// Endpoints to which connections are redirected, and their provider.
#[derive(Clone, Debug, Default)]
pub(super) struct Endpoints {
    pub(super) addresses: Vec<IpAddr>,
    /// Part of `addresses` whose denials can be explained.
    pub(super) explained: Vec<IpAddr>,
    pub(super) provider: &'static str,
}

impl From<&EndpointSet> for Endpoints {
    fn from(EndpointSet { endpoints, provider, .. }: &EndpointSet) -> Self {
        let addresses: Vec<_> = endpoints.iter().map(|endpoint| endpoint.address).collect();
        let http = Provider::named(provider).map(Provider::http_addresses).unwrap_or_default();
        Self {
            explained: addresses.iter().copied().filter(|address| http.contains(address)).collect(),
            addresses,
            provider,
        }
    }
}

/// Returns the listeners that these rules need for the senders found for each. A sender that another rule exempts from
/// enforcement at an endpoint needs none there.
pub(super) fn desired_listeners(
    rules: &[Exempt],
    found: &[IdentitySet],
    exempt: &BTreeMap<ExemptionKey, ExemptionRecord>,
    Endpoints { addresses, provider, .. }: &Endpoints,
) -> DesiredListeners {
    let mut matching: BTreeMap<RedirectKey, (DesiredListener, Vec<u32>)> = BTreeMap::new();
    for ((rule, senders), number) in rules.iter().zip(found).zip(1..) {
        if rule.allow.is_none() {
            continue;
        }
        for (&cookie, &inode) in &senders.namespaces {
            let subject = Subject::new(SubjectKind::Netns, cookie);
            let is_exempt = |address: Address| exempt.contains_key(&ExemptionKey { address, subject });
            let covered = addresses.iter().filter(|endpoint| covers(&rule.scope, **endpoint));
            for &endpoint in covered {
                if is_exempt(Address::ANY) || is_exempt(address_key(endpoint)) {
                    continue;
                }
                let (listener, numbers) = matching.entry((cookie, endpoint)).or_insert_with(|| {
                    let allow = Arc::default();
                    (DesiredListener { inode, provider, rule: number, rules: 0, allow }, Vec::new())
                });
                listener.rules += 1;
                numbers.push(number);
            }
        }
    }
    let mut lists = BTreeMap::new();
    let with_list = |(redirect, (listener, numbers)): (RedirectKey, (DesiredListener, Vec<u32>))| {
        let list = lists.entry(numbers).or_insert_with_key(|numbers| Arc::new(merged(rules, numbers)));
        (redirect, DesiredListener { allow: Arc::clone(list), ..listener })
    };
    matching.into_iter().map(with_list).collect()
}

/// Returns the requests that any of the rules with these numbers allows.
fn merged(rules: &[Exempt], numbers: &[u32]) -> BTreeSet<String> {
    let rules = numbers.iter().filter_map(|&number| rules.get(number as usize - 1));
    rules.filter_map(|rule| rule.allow.as_ref()).flatten().cloned().collect()
}

fn covers(scope: &EndpointSelector, endpoint: IpAddr) -> bool {
    match scope {
        EndpointSelector::All => true,
        EndpointSelector::Only(addresses) => addresses.contains(&endpoint),
    }
}

/// [`RuleContext::redirect_obstacle`] of an agent without a broker.
pub(super) const NO_BROKER: &str = "`allow` needs an agent that keeps running, unlike `run --once`";
/// [`RuleContext::redirect_obstacle`] of a node without the socket hook.
pub(super) const NO_SOCKET_HOOK: &str = "`allow` needs the socket hook, which is off or not attached";

/// Returns the reason why a rule with `allow` cannot be applied to all senders that it matches.
pub(super) fn unsupported(senders: &IdentitySet, context: &RuleContext) -> Option<String> {
    if let Some(obstacle) = context.redirect_obstacle {
        return Some(format!("{obstacle}: the pods are denied"));
    }
    if let Some(pod) = &senders.without_cookie {
        return Some(format!(
            "`allow` needs Linux 5.14, because older kernels have no cookie for the network namespace of {pod}: the pod is denied"
        ));
    }
    senders.on_node.then(|| {
        "`allow` does not cover hostNetwork pods and processes of the node: it does not change what they may reach".to_owned()
    })
}

#[cfg(test)]
mod tests {
    use imds_ebpf_common::Verdict;

    use super::*;
    use crate::config::RuleSubject;

    const ONE: [u8; 4] = [10, 0, 0, 1];
    const OTHER: [u8; 4] = [10, 0, 0, 2];

    fn rule(only: Option<[u8; 4]>, allow: &[&str]) -> Exempt {
        let scope = only
            .map_or(EndpointSelector::All, |address| EndpointSelector::Only([IpAddr::from(address)].into()));
        let allow = (!allow.is_empty()).then(|| allow.iter().map(|&text| text.to_owned()).collect());
        let sender = RuleSubject::Netns("/n".into());
        Exempt { name: "a".to_owned(), sender, scope, is_audited: false, allow }
    }

    fn found(cookie: u64) -> IdentitySet {
        IdentitySet { cookies: [cookie].into(), namespaces: [(cookie, 70)].into(), ..IdentitySet::default() }
    }

    fn listeners(
        rules: &[Exempt],
        cookies: &[u64],
        exempt: &BTreeMap<ExemptionKey, ExemptionRecord>,
    ) -> Vec<(u64, IpAddr, u32, u32, String)> {
        let found: Vec<_> = cookies.iter().copied().map(found).collect();
        let addresses = [ONE, OTHER].map(IpAddr::from).into();
        let endpoints = Endpoints { addresses, explained: Vec::new(), provider: "azure" };
        let desired = desired_listeners(rules, &found, exempt, &endpoints);
        let plain = |((cookie, endpoint), listener): (RedirectKey, DesiredListener)| {
            let allow = listener.allow.iter().cloned().collect::<Vec<_>>().join(",");
            (cookie, endpoint, listener.rule, listener.rules, allow)
        };
        desired.into_iter().map(plain).collect()
    }

    #[test]
    fn lists_of_matching_rules_are_merged() {
        let none = BTreeMap::new();
        let [one, other] = [ONE, OTHER].map(IpAddr::from);
        assert_eq!(listeners(&[rule(None, &[])], &[7], &none), []);
        let rules = [rule(Some(ONE), &["GET /b"]), rule(None, &["GET /a"]), rule(None, &["GET /c"])];
        assert_eq!(
            listeners(&rules, &[7, 7, 8], &none),
            [
                (7, one, 1, 2, "GET /a,GET /b".to_owned()),
                (7, other, 2, 1, "GET /a".to_owned()),
                (8, one, 3, 1, "GET /c".to_owned()),
                (8, other, 3, 1, "GET /c".to_owned()),
            ]
        );
    }

    #[test]
    fn exempt_senders_need_no_listener() {
        let exempt = |address| {
            let key = ExemptionKey { address, subject: Subject::new(SubjectKind::Netns, 7) };
            BTreeMap::from([(key, ExemptionRecord::new(Verdict::Exempt, 1))])
        };
        let rules = [rule(None, &["GET /a"])];
        assert_eq!(listeners(&rules, &[7], &exempt(Address::ANY)), []);
        let left = listeners(&rules, &[7], &exempt(Address::from_ipv4(ONE)));
        assert_eq!(left, [(7, OTHER.into(), 1, 1, "GET /a".to_owned())]);
        assert_eq!(listeners(&rules, &[8], &exempt(Address::ANY)).len(), 2);
    }

    #[test]
    fn unsupported_senders_are_named() {
        let complete = RuleContext {
            socket_hook_on: true,
            redirect_obstacle: None,
            is_enforcing: true,
            endpoints: Endpoints::default(),
        };
        assert_eq!(unsupported(&found(7), &complete), None);
        let without_broker = RuleContext { redirect_obstacle: Some(NO_BROKER), ..complete.clone() };
        assert!(unsupported(&found(7), &without_broker).unwrap().contains("run --once"));
        let old = IdentitySet { without_cookie: Some("/n".to_owned()), ..IdentitySet::default() };
        assert!(unsupported(&old, &complete).unwrap().contains("Linux 5.14"));
        let host = IdentitySet { on_node: true, ..IdentitySet::default() };
        assert!(unsupported(&host, &complete).unwrap().contains("hostNetwork"));
    }
}
