//! Exemptions: the operator's rules, and the identities of the senders on this node that they match.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::Path,
};

use imds_ebpf_common::{Address, ExemptionKey, ExemptionRecord, Subject, SubjectKind, Verdict};

use crate::{
    config::{self, EndpointSelector, Exempt, RuleSubject, Selector},
    controller::{
        pod_tracker::PodTracker,
        scoped_rules::{self, DesiredListeners, RuleContext, desired_listeners},
    },
    datapath::exemption_set::ExemptionSet,
    encode::address_key,
    node::{
        link::Link,
        netlink::Netlink,
        sender_resolver::{Fingerprint, IdentitySet, SenderResolver},
    },
};

/// Exemption rules of the effective configuration.
#[derive(Debug, Default)]
pub struct ExemptionRules {
    /// Rules in the order of the configuration.
    pub(super) exempt: Vec<Exempt>,
    fingerprints: Vec<Fingerprint>,
    /// Reason why a rule cannot be applied completely, by name of the rule.
    pub(super) errors: BTreeMap<String, String>,
}

impl ExemptionRules {
    /// Creates the set of effective rules from those of the configuration.
    pub fn new(exempt: Vec<Exempt>) -> Self {
        Self { exempt, ..Self::default() }
    }

    /// Returns the selectors of the rules for Kubernetes pods.
    pub fn pod_selectors(&self) -> impl Iterator<Item = &config::PodSelector> {
        self.exempt.iter().filter_map(|rule| rule.sender.pod_selector())
    }

    /// Returns the selector of the rule with this number, counted from 1, if it is for Kubernetes pods.
    pub fn pod_selector(&self, rule: u32) -> Option<&config::PodSelector> {
        let rule = usize::try_from(rule).ok().and_then(|rule| self.exempt.get(rule.checked_sub(1)?));
        rule.and_then(|rule| rule.sender.pod_selector())
    }

    /// Replaces all rules, and clears their errors.
    pub fn set(&mut self, rules: Vec<Exempt>) {
        self.exempt = rules;
        self.errors.clear();
    }

    /// Reports whether a rule depends on paths whose changes the kernel does not report.
    pub fn need_polling(&self) -> bool {
        self.exempt.iter().any(|rule| rule.sender.path().is_some())
    }

    /// Reports whether rules with a path may match other senders than at the last [`ExemptionRules::resolve`].
    pub fn may_have_changed(&self) -> bool {
        self.fingerprints() != self.fingerprints
    }

    /// Describes the rules that cannot be applied completely, one line `NAME: REASON` each. A NUL, which a path in the
    /// configuration may contain, would end the record.
    pub(super) fn describe_errors(errors: &BTreeMap<String, String>) -> String {
        let lines =
            errors.iter().map(|(name, reason)| format!("{name}: {reason}").replace(['\n', '\0'], " "));
        lines.collect::<Vec<_>>().join("\n")
    }

    fn fingerprints(&self) -> Vec<Fingerprint> {
        self.exempt.iter().filter_map(|rule| rule.sender.path()).map(SenderResolver::fingerprint).collect()
    }

    /// Computes the exemptions and the listeners of scoped exemptions on a node with these `links` of `pods`.
    pub(super) async fn resolve(
        &mut self,
        resolver: &mut SenderResolver,
        netlink: &Netlink,
        links: &[&Link],
        pods: &PodTracker,
        context: &RuleContext,
    ) -> (ExemptionSet, DesiredListeners) {
        self.fingerprints = self.fingerprints();
        let mut found = Vec::new();
        let mut errors = BTreeMap::new();
        for rule in &self.exempt {
            let senders = match &rule.sender {
                RuleSubject::Interface(glob) => {
                    let matching: Vec<_> =
                        links.iter().copied().filter(|link| glob.matches(&link.name)).collect();
                    resolver.from_links(netlink, &matching).await
                }
                RuleSubject::Netns(path) => resolver.from_netns(netlink, links, path).await,
                RuleSubject::Cgroup(path) => resolver.from_cgroup(netlink, links, path).await,
                RuleSubject::Pods(rule) => pods.senders(rule),
            };
            if let Some(failure) = incomplete_reason(rule, &senders, context) {
                errors.insert(rule.name.clone(), failure);
            }
            found.push(senders);
        }
        for (name, failure) in &errors {
            if self.errors.get(name) != Some(failure) {
                log::warn!("exemption {name:?} cannot be applied completely: {failure}");
            }
        }
        self.errors = errors;
        let entries = exemption_entries(&self.exempt, &found);
        let listeners = if context.is_enforcing && context.redirect_obstacle.is_none() {
            desired_listeners(&self.exempt, &found, &entries, &context.endpoints)
        } else {
            DesiredListeners::new()
        };
        (ExemptionSet { entries, sources: source_entries(&self.exempt, &found) }, listeners)
    }
}

/// Returns the keys of the labels of namespaces that decide about the rules.
pub fn namespace_label_keys(rules: &[Exempt]) -> BTreeSet<String> {
    let selectors = rules.iter().filter_map(|rule| rule.sender.pod_selector()?.namespace.labels());
    selectors.flat_map(Selector::keys).map(str::to_owned).collect()
}

impl RuleSubject {
    fn pod_selector(&self) -> Option<&config::PodSelector> {
        match self {
            Self::Pods(pods) => Some(pods),
            Self::Interface(_) | Self::Netns(_) | Self::Cgroup(_) => None,
        }
    }

    fn path(&self) -> Option<&Path> {
        match self {
            Self::Netns(path) | Self::Cgroup(path) => Some(path),
            Self::Interface(_) | Self::Pods(_) => None,
        }
    }
}

/// Returns the reason why a rule cannot be applied to all senders that it matches.
fn incomplete_reason(rule: &Exempt, senders: &IdentitySet, context: &RuleContext) -> Option<String> {
    if rule.allow.is_some() {
        let unsupported = || scoped_rules::unsupported(senders, context);
        let error = senders.errors.first().cloned();
        return error.or_else(|| context.is_enforcing.then(unsupported).flatten());
    }
    let without_cookie = || {
        let pod = senders.without_cookie.as_ref().filter(|_| context.socket_hook_on)?;
        Some(format!(
            "this kernel (before Linux 5.14) has no cookie for the network namespace of {pod}: the socket hook does not exempt its \
             calls, set hooks.socket = false"
        ))
    };
    senders.errors.first().cloned().or_else(without_cookie)
}

/// Returns the exemptions that these rules give to the senders found for each. An exempting rule takes precedence over
/// an auditing one.
fn exemption_entries(rules: &[Exempt], found: &[IdentitySet]) -> BTreeMap<ExemptionKey, ExemptionRecord> {
    let mut entries = BTreeMap::new();
    for ((rule, senders), number) in rules.iter().zip(found).zip(1..) {
        if rule.allow.is_some() {
            continue;
        }
        let verdict = if rule.is_audited { Verdict::Audited } else { Verdict::Exempt };
        let record = ExemptionRecord::new(verdict, number);
        for subject in subjects(senders) {
            for address in addresses(&rule.scope) {
                let entry: &mut ExemptionRecord =
                    entries.entry(ExemptionKey { address, subject }).or_insert(record);
                if entry.verdict == Verdict::Audited as u32 && verdict == Verdict::Exempt {
                    *entry = record;
                }
            }
        }
    }
    // The programs look up the entry of an endpoint first, which must not hide an exemption for all endpoints.
    let is_of_all = |exemption: &ExemptionKey| exemption.address == Address::ANY;
    let exempt_from_all: BTreeSet<_> = entries
        .iter()
        .filter(|(exemption, record)| is_of_all(exemption) && record.verdict == Verdict::Exempt as u32)
        .map(|(exemption, _)| exemption.subject)
        .collect();
    entries.retain(|exemption, _| is_of_all(exemption) || !exempt_from_all.contains(&exemption.subject));
    entries
}

/// Returns the source addresses of the pods that were found.
fn source_entries(rules: &[Exempt], found: &[IdentitySet]) -> BTreeSet<ExemptionKey> {
    let exempt = rules.iter().zip(found).filter(|(rule, _)| rule.allow.is_none());
    let of_links = exempt.flat_map(|(_, senders)| &senders.addresses);
    let exemption = |&(index, source): &(u32, IpAddr)| {
        let subject = Subject::new(SubjectKind::Interface, index.into());
        ExemptionKey { address: address_key(source), subject }
    };
    of_links.map(exemption).collect()
}

fn subjects(IdentitySet { interfaces, cookies, cgroups, .. }: &IdentitySet) -> impl Iterator<Item = Subject> {
    let interfaces = interfaces.iter().map(|&index| Subject::new(SubjectKind::Interface, index.into()));
    let cookies = cookies.iter().map(|&cookie| Subject::new(SubjectKind::Netns, cookie));
    let cgroups = cgroups.iter().map(|&id| Subject::new(SubjectKind::Cgroup, id));
    interfaces.chain(cookies).chain(cgroups)
}

fn addresses(scope: &EndpointSelector) -> Vec<Address> {
    match scope {
        EndpointSelector::All => vec![Address::ANY],
        EndpointSelector::Only(addresses) => addresses.iter().copied().map(address_key).collect(),
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;
    use crate::controller::scoped_rules::Endpoints;

    const ONE: [u8; 4] = [10, 0, 0, 1];

    fn rule(addresses: Option<[u8; 4]>, is_audited: bool) -> Exempt {
        let scope = addresses
            .map_or(EndpointSelector::All, |address| EndpointSelector::Only([IpAddr::from(address)].into()));
        Exempt {
            name: "a".to_owned(),
            sender: RuleSubject::Netns("/n".into()),
            scope,
            is_audited,
            allow: None,
        }
    }

    fn found(interface: u32) -> IdentitySet {
        IdentitySet { interfaces: [interface].into(), ..IdentitySet::default() }
    }

    fn entries(rules: &[(Exempt, IdentitySet)]) -> Vec<(Address, u64, u32, u32)> {
        let (rules, found): (Vec<_>, Vec<_>) = rules.iter().cloned().unzip();
        let plain = |(exemption, record): (ExemptionKey, ExemptionRecord)| {
            (exemption.address, exemption.subject.id, record.verdict, record.rule)
        };
        exemption_entries(&rules, &found).into_iter().map(plain).collect()
    }

    #[test]
    fn missing_cookie_is_reported_for_socket() {
        let senders = IdentitySet { without_cookie: Some("/n".to_owned()), ..found(7) };
        let context = |socket_hook_on| RuleContext {
            socket_hook_on,
            redirect_obstacle: None,
            is_enforcing: true,
            endpoints: Endpoints::default(),
        };
        let rule = rule(None, false);
        assert!(
            incomplete_reason(&rule, &senders, &context(true))
                .unwrap()
                .contains("network namespace of /n: the socket hook does not exempt its")
        );
        assert_eq!(incomplete_reason(&rule, &senders, &context(false)), None);
        let unknown = IdentitySet { errors: ["gone".to_owned()].into(), ..senders };
        assert_eq!(incomplete_reason(&rule, &unknown, &context(false)).unwrap(), "gone");
    }

    #[test]
    fn each_error_is_one_line() {
        let errors = [("a", "/x\0y\nz"), ("b", "gone")].map(|(name, reason)| (name.into(), reason.into()));
        assert_eq!(ExemptionRules::describe_errors(&errors.into()), "a: /x y z\nb: gone");
    }

    #[test]
    fn senders_get_their_rules() {
        let (exempt, audit) = (Verdict::Exempt as u32, Verdict::Audited as u32);
        let (all, one) = (Address::ANY, Address::from_ipv4(ONE));
        assert_eq!(entries(&[]), []);
        assert_eq!(entries(&[(rule(None, false), IdentitySet::default())]), []);
        assert_eq!(entries(&[(rule(None, false), found(7))]), [(all, 7, exempt, 1)]);
        assert_eq!(entries(&[(rule(Some(ONE), true), found(7))]), [(one, 7, audit, 1)]);
        let both = [(rule(Some(ONE), true), found(7)), (rule(Some(ONE), false), found(7))];
        assert_eq!(entries(&both), [(one, 7, exempt, 2)]);
        let both = [(rule(Some(ONE), true), found(7)), (rule(None, false), found(7))];
        assert_eq!(entries(&both), [(all, 7, exempt, 2)]);
        let both = [(rule(Some(ONE), false), found(7)), (rule(None, true), found(7))];
        assert_eq!(entries(&both), [(all, 7, audit, 2), (one, 7, exempt, 1)]);
        let others = [(rule(Some(ONE), true), found(7)), (rule(None, false), found(8))];
        assert_eq!(entries(&others), [(all, 8, exempt, 2), (one, 7, audit, 1)]);
        let everything = IdentitySet { cookies: [9].into(), cgroups: [10].into(), ..found(7) };
        let kinds: Vec<_> = subjects(&everything).map(|subject| (subject.kind, subject.id)).collect();
        assert_eq!(kinds, [(1, 7), (2, 9), (3, 10)]);
    }
}
