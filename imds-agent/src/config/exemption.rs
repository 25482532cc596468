//! `[[exempt]]`: rules that exempt senders from enforcement. Nothing else exempts a sender.

#[cfg(test)]
mod tests;

use std::{
    collections::BTreeSet,
    fmt,
    net::IpAddr,
    ops::Range,
    path::{Component, Path, PathBuf},
};

use globset::{Glob, GlobMatcher};
use serde::{Deserialize, Serialize};
use toml::Spanned;

use super::{
    ConfigError, ConfigErrors,
    allowed_requests::AllowedRequests,
    names,
    selector::{NAMESPACE_SELECTOR, POD_SELECTOR, Selector, SelectorTable},
    source::{Diagnostics, Location},
    suggest::did_you_mean,
};
use crate::config::endpoint_set::EndpointSet;

/// Longest name of a rule in characters, like that of a DNS label in Kubernetes.
const MAX_NAME: usize = 63;

/// Exemption rules before their endpoint names are resolved, which depends on the machine.
#[derive(Clone, Debug, Default)]
pub struct Exemptions {
    rules: Vec<UnresolvedRule>,
}

#[derive(Clone, Debug)]
struct UnresolvedRule {
    name: String,
    sender: RuleSubject,
    is_audited: bool,
    /// Endpoint names with their locations in the file; `None` for all endpoints.
    endpoints: Option<Vec<(String, Location)>>,
    /// Requests that the rule allows; `None` for all, without a broker between.
    allow: Option<AllowedRequests>,
}

/// Exemption rule with resolved endpoints.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Exempt {
    /// Name of the rule in logs, reports and metrics.
    pub name: String,
    /// Senders that the rule matches.
    pub sender: RuleSubject,
    /// Endpoints that the rule covers.
    pub scope: EndpointSelector,
    /// True if requests that the rule allows are counted and reported as in audit mode.
    pub is_audited: bool,
    /// Requests of a scoped exemption, which go through the broker; `None` for an exemption from enforcement.
    pub allow: Option<Vec<String>>,
}

/// Selector of the senders that a rule matches.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum RuleSubject {
    /// Pods whose host-side interface has a matching name.
    Interface(NameGlob),
    /// Processes in the network namespace at this absolute path.
    Netns(PathBuf),
    /// Pods with processes in this cgroup or below. The path is absolute, or relative to the mount point of a
    /// hierarchy.
    Cgroup(PathBuf),
    /// Pods of this node that match, according to the API server.
    Pods(PodSelector),
}

/// Selector of Kubernetes pods by namespace, service account and labels.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PodSelector {
    /// Namespaces of the selected pods.
    pub namespace: NamespaceSelector,
    /// Service account of the pods; `None` matches any.
    pub service_account: Option<String>,
    /// Labels of the pods; `None` matches any.
    pub selector: Option<Selector>,
}

/// Selector of the namespaces of pods.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum NamespaceSelector {
    /// The namespace with this name.
    Name(String),
    /// All namespaces whose labels match.
    Labels(Selector),
}

impl NamespaceSelector {
    /// Returns the selector of labels, if it is one.
    pub fn labels(&self) -> Option<&Selector> {
        match self {
            Self::Name(_) => None,
            Self::Labels(selector) => Some(selector),
        }
    }
}

impl fmt::Display for NamespaceSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => write!(f, "namespace {name}"),
            Self::Labels(_) => f.write_str("namespace selector"),
        }
    }
}

/// Glob that matches interface names.
#[derive(Clone, Debug)]
pub struct NameGlob(GlobMatcher);

impl NameGlob {
    /// Reports whether the glob matches an interface name.
    pub fn matches(&self, name: &str) -> bool {
        self.0.is_match(name)
    }
}

impl fmt::Display for NameGlob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.glob().glob())
    }
}

impl PartialEq for NameGlob {
    fn eq(&self, other: &Self) -> bool {
        self.0.glob() == other.0.glob()
    }
}

impl Eq for NameGlob {}

/// Subset of the protected endpoints.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum EndpointSelector {
    /// All protected endpoints, including later additions.
    All,
    /// Only the endpoints with these addresses.
    Only(BTreeSet<IpAddr>),
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ExemptTable {
    name: Spanned<String>,
    interface: Option<Spanned<String>>,
    netns: Option<Spanned<PathBuf>>,
    cgroup: Option<Spanned<PathBuf>>,
    namespace: Option<Spanned<String>>,
    namespace_selector: Option<Spanned<SelectorTable>>,
    service_account: Option<Spanned<String>>,
    endpoints: Option<Spanned<Vec<Spanned<String>>>>,
    #[serde(default)]
    audit: bool,
    allow: Option<Spanned<Vec<Spanned<String>>>>,
    pod_selector: Option<Spanned<SelectorTable>>,
}

impl Exemptions {
    pub(super) fn parse(tables: &[ExemptTable], diagnostics: &mut Diagnostics<'_>) -> Self {
        let mut rules: Vec<UnresolvedRule> = Vec::new();
        for table in tables {
            let Some(rule) = parse_rule(table, diagnostics) else { continue };
            let checked = check_new(&rule, &rules).map(|()| rule);
            rules.extend(diagnostics.ok(table.name.span(), checked));
        }
        Self { rules }
    }

    /// Returns the location of the first rule for Kubernetes pods, if the file has one, and the key that makes it one.
    pub(super) fn first_pod_rule(&self, tables: &[ExemptTable]) -> Option<(Range<usize>, &'static str)> {
        let of_pods = |rule: &&UnresolvedRule| matches!(rule.sender, RuleSubject::Pods(_));
        let name = &self.rules.iter().find(of_pods)?.name;
        let table = tables.iter().find(|table| table.name.get_ref() == name)?;
        let key = if table.namespace.is_some() { "exempt.namespace" } else { NAMESPACE_SELECTOR };
        Some((table.name.span(), key))
    }

    /// Returns the rules with their endpoint names resolved to addresses of `endpoint_set`.
    pub fn resolve(&self, endpoint_set: &EndpointSet) -> Result<Vec<Exempt>, ConfigErrors> {
        let (mut rules, mut errors) = (Vec::new(), Vec::new());
        for UnresolvedRule { name, sender, is_audited, endpoints, allow } in self.rules.iter().cloned() {
            let scope = endpoints.map_or(EndpointSelector::All, |names| {
                let addresses = names.iter().map(|(name, location)| address(name, location, endpoint_set));
                let known = addresses.filter_map(|address| address.map_err(|error| errors.push(error)).ok());
                EndpointSelector::Only(known.collect())
            });
            let allow = allow.map(|allow| allow.expand(endpoint_set.provider));
            let allow = allow.transpose().map_err(|error| errors.push(error)).unwrap_or_default();
            rules.push(Exempt { name, sender, scope, is_audited, allow });
        }
        ConfigErrors::check(errors)?;
        Ok(rules)
    }
}

fn address(name: &str, location: &Location, endpoint_set: &EndpointSet) -> Result<IpAddr, ConfigError> {
    let endpoints = &endpoint_set.endpoints;
    endpoints.iter().find(|endpoint| endpoint.name == name).map(|endpoint| endpoint.address).ok_or_else(
        || {
            let valid: Vec<_> = endpoints.iter().map(|endpoint| endpoint.name.as_str()).collect();
            let suggestion = did_you_mean(name, valid.iter().copied());
            let valid = valid.join(", ");
            location
                .error(format!("exempt.endpoints: no endpoint is named {name:?}, only {valid}{suggestion}"))
        },
    )
}

fn check_new(rule: &UnresolvedRule, others: &[UnresolvedRule]) -> Result<(), String> {
    if others.iter().any(|other| other.name == rule.name) {
        return Err(format!("exempt.name: {:?} is already the name of another rule", rule.name));
    }
    if let Some(other) = others.iter().find(|other| other.sender == rule.sender && other.overlaps(rule)) {
        let reason = if other.allow.is_some() != rule.allow.is_some() {
            "contradict each other: only one limits the requests of the same sender"
        } else if other.is_audited == rule.is_audited {
            "are duplicates: both match the same sender"
        } else {
            "contradict each other: one audits and the other exempts the same sender"
        };
        return Err(format!("exempt: {:?} and {:?} {reason}", other.name, rule.name));
    }
    Ok(())
}

impl UnresolvedRule {
    fn overlaps(&self, other: &Self) -> bool {
        match (&self.endpoints, &other.endpoints) {
            (Some(own), Some(others)) => {
                own.iter().any(|(name, _)| others.iter().any(|(other, _)| name == other))
            }
            (None, _) | (_, None) => true,
        }
    }
}

/// Parses a rule. Records the errors of all its keys.
fn parse_rule(table: &ExemptTable, diagnostics: &mut Diagnostics<'_>) -> Option<UnresolvedRule> {
    let name = diagnostics.plain_name(&table.name, "exempt.name", MAX_NAME);
    let sender = parse_sender(table, diagnostics);
    let endpoints = table.endpoints.as_ref().map(|names| parse_endpoints(names, diagnostics));
    let allow = table.allow.as_ref().map(|allow| AllowedRequests::parse(allow, diagnostics));
    if let Some(allow) = &table.allow {
        check_scoped(table, allow.span(), diagnostics);
    }
    Some(UnresolvedRule { name: name?, sender: sender?, is_audited: table.audit, endpoints, allow })
}

/// Records an error for each key that a rule with `allow` must not have.
fn check_scoped(table: &ExemptTable, span: Range<usize>, diagnostics: &mut Diagnostics<'_>) {
    if table.audit {
        let message = "exempt.allow: the broker refuses other requests; remove `audit = true`, or `allow`";
        diagnostics.error(span.clone(), message);
    }
    if table.interface.is_some() {
        let message = "exempt.allow: the agent cannot see the end of a sandbox by its interface; use `namespace`, `namespace_selector`, \
                       `cgroup` or `netns`";
        diagnostics.error(span, message);
    }
}

fn parse_sender(table: &ExemptTable, diagnostics: &mut Diagnostics<'_>) -> Option<RuleSubject> {
    let ExemptTable { name, interface, netns, cgroup, namespace, namespace_selector, .. } = table;
    if namespace.is_none()
        && namespace_selector.is_none()
        && let Some(beside) = first_pod_key(table)
    {
        let message = "exempt: service_account and pod_selector need a namespace or namespace_selector";
        diagnostics.error(beside, message);
        return None;
    }
    match (interface, netns, cgroup, namespace, namespace_selector) {
        (Some(glob), None, None, None, None) => {
            diagnostics.ok(glob.span(), parse_interface(glob.get_ref())).map(RuleSubject::Interface)
        }
        (None, Some(path), None, None, None) => {
            parse_path(path, "netns", diagnostics).map(RuleSubject::Netns)
        }
        (None, None, Some(path), None, None) => {
            parse_path(path, "cgroup", diagnostics).map(RuleSubject::Cgroup)
        }
        (None, None, None, Some(_), None) | (None, None, None, None, Some(_)) => {
            parse_pods(table, diagnostics).map(RuleSubject::Pods)
        }
        (None, None, None, None, None) => {
            let message = "exempt: missing selector: set one of `interface`, `netns`, `cgroup`, `namespace`, `namespace_selector`";
            diagnostics.error(name.span(), message);
            None
        }
        (_, _, _, _, _) => {
            let message =
                "exempt: set only one of `interface`, `netns`, `cgroup`, `namespace`, `namespace_selector`";
            diagnostics.error(name.span(), message);
            None
        }
    }
}

/// Returns the location of a key that is only allowed in a rule for Kubernetes pods.
fn first_pod_key(table: &ExemptTable) -> Option<Range<usize>> {
    let service_account = table.service_account.as_ref().map(Spanned::span);
    service_account.or_else(|| table.pod_selector.as_ref().map(Spanned::span))
}

/// Parses the selector of Kubernetes pods, and records the errors of all its keys. A selector of namespaces is required,
/// because the author of a pod can choose labels freely.
fn parse_pods(
    ExemptTable { namespace, namespace_selector, service_account, pod_selector, .. }: &ExemptTable,
    diagnostics: &mut Diagnostics<'_>,
) -> Option<PodSelector> {
    let mut checked = |name: &Spanned<String>, key: &str, is_name: fn(&str) -> bool| {
        let text = name.get_ref().clone();
        let is_valid = is_name(&text);
        let message = || format!("exempt.{key}: {:?} is not a valid name", name.get_ref());
        diagnostics.ok(name.span(), is_valid.then_some(text).ok_or_else(message))
    };
    let name = namespace.as_ref().and_then(|name| checked(name, "namespace", names::is_dns_label));
    let account =
        service_account.as_ref().map(|name| checked(name, "service_account", names::is_dns_subdomain));
    let labels = namespace_selector.as_ref();
    let labels = labels.and_then(|table| Selector::parse(table, NAMESPACE_SELECTOR, diagnostics));
    let namespace = name.map(NamespaceSelector::Name).or_else(|| labels.map(NamespaceSelector::Labels));
    let selector = pod_selector.as_ref().map(|table| Selector::parse(table, POD_SELECTOR, diagnostics));
    // `None` stands for a key that is not set, `Some(None)` for an invalid one.
    let service_account = account.map_or(Some(None), |account| account.map(Some));
    let selector = selector.map_or(Some(None), |selector| selector.map(Some));
    Some(PodSelector { namespace: namespace?, service_account: service_account?, selector: selector? })
}

fn parse_interface(glob: &str) -> Result<NameGlob, String> {
    if glob.is_empty() {
        let message = "exempt.interface: \"\" matches no interface; \"*\" matches the interface of every pod";
        return Err(message.to_owned());
    }
    let compiled = Glob::new(glob).map_err(|cause| format!("exempt.interface: {cause}"))?;
    Ok(NameGlob(compiled.compile_matcher()))
}

/// Parses a path. Rejects relative components and paths that match everything.
fn parse_path(path: &Spanned<PathBuf>, key: &str, diagnostics: &mut Diagnostics<'_>) -> Option<PathBuf> {
    let escapes = diagnostics.source.check_systemd_escapes(path.span());
    diagnostics.ok(path.span(), escapes.map_err(|message| format!("exempt.{key}: {message}")))?;
    let value: &Path = path.get_ref();
    let is_plain = value.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    let complaint = if key == "netns" && !value.is_absolute() {
        "is not an absolute path"
    } else if !is_plain {
        "must not contain `.` or `..`"
    } else if value.file_name().is_none() {
        "has no last component"
    } else {
        return Some(value.to_owned());
    };
    diagnostics.error(path.span(), format!("exempt.{key}: \"{}\" {complaint}", value.display()));
    None
}

/// Parses the names of endpoints. Records an error for an empty list and for each duplicate.
fn parse_endpoints(
    names: &Spanned<Vec<Spanned<String>>>,
    diagnostics: &mut Diagnostics<'_>,
) -> Vec<(String, Location)> {
    if names.get_ref().is_empty() {
        let message = "exempt.endpoints: an empty list exempts the pods from nothing; remove the key to cover all endpoints";
        diagnostics.error(names.span(), message);
    }
    let mut seen = BTreeSet::new();
    for twice in names.get_ref().iter().filter(|name| !seen.insert(name.get_ref())) {
        diagnostics.error(twice.span(), format!("exempt.endpoints: {:?} is listed twice", twice.get_ref()));
    }
    let source = diagnostics.source;
    names.get_ref().iter().map(|name| (name.get_ref().clone(), source.location(name.span()))).collect()
}
