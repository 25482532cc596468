//! `[[exempt]]`: who may reach guarded endpoints after all. Nothing else grants that.

use std::{
    collections::BTreeSet,
    path::{Component, Path, PathBuf},
};

use globset::{Glob, GlobMatcher};
use serde::Deserialize;
use toml::Spanned;

use super::{
    ConfigError, Place, Source, names,
    selector::{Selector, SelectorTable},
};
use crate::endpoints::Guarded;

/// The rules as written: which endpoints there are is known only on the machine.
#[derive(Clone, Debug, Default)]
pub struct Exemptions {
    rules: Vec<Written>,
}

#[derive(Clone, Debug)]
struct Written {
    rule: Exempt,
    /// Where each endpoint is named.
    endpoints: Vec<(String, Place)>,
}

/// One rule.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Exempt {
    /// Its name, by which it is reported.
    pub name: String,
    /// Whom it is for.
    pub subject: Subject,
    /// Which endpoints it is for.
    pub endpoints: Scope,
    /// Whether what it lets pass is judged as in audit mode: counted and reported.
    pub audit: bool,
}

/// Whom a rule is for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Subject {
    /// Interfaces with such a name.
    Interface(NameGlob),
    /// The network namespace at this absolute path.
    Netns(PathBuf),
    /// This cgroup and those below it: a path below the mount of the hierarchy, or an absolute one.
    Cgroup(PathBuf),
    /// Pods of this node.
    Pods(Pods),
}

/// Which pods a rule is for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Pods {
    /// Their namespace.
    pub namespace: String,
    /// Their service account; all of them without.
    pub service_account: Option<String>,
    /// Their labels; any without.
    pub selector: Option<Selector>,
}

/// A glob of interface names.
#[derive(Clone, Debug)]
pub struct NameGlob(GlobMatcher);

impl NameGlob {
    /// Whether an interface of this name is meant.
    #[must_use]
    pub fn matches(&self, name: &str) -> bool {
        self.0.is_match(name)
    }
}

impl PartialEq for NameGlob {
    fn eq(&self, other: &Self) -> bool {
        self.0.glob() == other.0.glob()
    }
}

impl Eq for NameGlob {}

/// Some of the guarded endpoints.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Scope {
    /// All.
    All,
    /// Those of these names.
    Named(BTreeSet<String>),
}

impl Scope {
    /// None of the endpoints.
    pub const NONE: Self = Self::Named(BTreeSet::new());

    /// Whether no endpoint is in it.
    #[must_use]
    pub fn is_none(&self) -> bool {
        *self == Self::NONE
    }

    /// Whether the endpoint of this name is in it.
    #[must_use]
    pub fn has(&self, endpoint: &str) -> bool {
        match self {
            Self::All => true,
            Self::Named(names) => names.contains(endpoint),
        }
    }

    /// What is in either.
    #[must_use]
    pub fn union(self, other: &Self) -> Self {
        match (self, other) {
            (Self::Named(mut names), Self::Named(others)) => {
                names.extend(others.iter().cloned());
                Self::Named(names)
            }
            (Self::All, _) | (_, Self::All) => Self::All,
        }
    }

    fn overlaps(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Named(names), Self::Named(others)) => !names.is_disjoint(others),
            (Self::All, _) | (_, Self::All) => true,
        }
    }
}

impl Exemptions {
    /// The rules, each of whose endpoints is one of `guarded`.
    pub fn resolve(&self, guarded: &Guarded) -> Result<Vec<Exempt>, ConfigError> {
        let known: BTreeSet<_> = guarded.endpoints().iter().map(|endpoint| endpoint.name.as_str()).collect();
        for (name, place) in self.rules.iter().flat_map(|written| &written.endpoints) {
            if !known.contains(name.as_str()) {
                let known = known.iter().copied().collect::<Vec<_>>().join(", ");
                let message = format!("exempt.endpoints: no endpoint is named {name:?}, only {known}");
                return Err(place.error(message));
            }
        }
        Ok(self.rules.iter().map(|written| written.rule.clone()).collect())
    }

    /// Whether a rule is for pods, so that they must be looked up.
    #[must_use]
    pub fn need_pods(&self) -> bool {
        self.rules.iter().any(|written| matches!(written.rule.subject, Subject::Pods(_)))
    }

    /// `without_pods`: whether the operator switched off the looking up of pods.
    pub(super) fn parse(
        tables: &[ExemptTable],
        without_pods: bool,
        source: Source<'_>,
    ) -> Result<Self, ConfigError> {
        let mut rules: Vec<Written> = Vec::new();
        let mut seen = BTreeSet::new();
        for table in tables {
            let written = parse_rule(table, source)?;
            let at_name = |message| Err(source.error(table.name.span(), message));
            if !seen.insert(table.name.get_ref()) {
                return at_name(format!("exempt.name: {:?} is there twice", table.name.get_ref()));
            }
            if without_pods && matches!(written.rule.subject, Subject::Pods(_)) {
                let message = "exempt.namespace: no pod is known with kubernetes.enabled = \"no\"";
                return at_name(message.to_owned());
            }
            if let Some(other) = rules.iter().find(|other| contradict(&other.rule, &written.rule)) {
                let (other, this) = (&other.rule.name, &written.rule.name);
                return at_name(format!(
                    "exempt: of {other:?} and {this:?} one audits what the other exempts, for the same subject"
                ));
            }
            rules.push(written);
        }
        Ok(Self { rules })
    }
}

fn contradict(one: &Exempt, other: &Exempt) -> bool {
    one.subject == other.subject && one.audit != other.audit && one.endpoints.overlaps(&other.endpoints)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ExemptTable {
    name: Spanned<String>,
    interface: Option<Spanned<String>>,
    netns: Option<Spanned<String>>,
    cgroup: Option<Spanned<String>>,
    namespace: Option<Spanned<String>>,
    service_account: Option<Spanned<String>>,
    pod_selector: Option<Spanned<SelectorTable>>,
    endpoints: Option<Spanned<Vec<Spanned<String>>>>,
    #[serde(default)]
    audit: bool,
}

fn parse_rule(table: &ExemptTable, source: Source<'_>) -> Result<Written, ConfigError> {
    let name = table.name.get_ref();
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    if name.is_empty() || name.len() > 63 || !name.bytes().all(is_plain) {
        let message = format!("exempt.name: {name:?} is not 1 to 63 letters, digits, '-', '_' or '.'");
        return Err(source.error(table.name.span(), message));
    }
    let subject = parse_subject(table, source)?;
    let (scope, endpoints) = match &table.endpoints {
        None => (Scope::All, Vec::new()),
        Some(names) => parse_endpoints(names, source)?,
    };
    let rule = Exempt { name: name.clone(), subject, endpoints: scope, audit: table.audit };
    Ok(Written { rule, endpoints })
}

fn parse_subject(table: &ExemptTable, source: Source<'_>) -> Result<Subject, ConfigError> {
    let ExemptTable { name, interface, netns, cgroup, namespace, service_account, pod_selector, .. } = table;
    let spans = [
        interface.as_ref().map(Spanned::span),
        netns.as_ref().map(Spanned::span),
        cgroup.as_ref().map(Spanned::span),
        namespace.as_ref().map(Spanned::span),
    ];
    let mut spans: Vec<_> = spans.into_iter().flatten().collect();
    spans.sort_by_key(|span| span.start);
    if let Some(second) = spans.get(1) {
        let message = "exempt: interface, netns, cgroup and namespace: a rule has only one of them";
        return Err(source.error(second.clone(), message.to_owned()));
    }
    if let (None, Some(span)) =
        (namespace, service_account.as_ref().map(Spanned::span).or(pod_selector.as_ref().map(Spanned::span)))
    {
        let message = "exempt: service_account and pod_selector need a namespace";
        return Err(source.error(span, message.to_owned()));
    }
    if let Some(glob) = interface {
        return parse_interface(glob, source);
    }
    if let Some(path) = netns {
        return Ok(Subject::Netns(parse_path(path, "netns", true, source)?));
    }
    if let Some(path) = cgroup {
        return Ok(Subject::Cgroup(parse_path(path, "cgroup", false, source)?));
    }
    let Some(namespace) = namespace else {
        let message = "exempt: says not whom: one of interface, netns, cgroup and namespace is needed";
        return Err(source.error(name.span(), message.to_owned()));
    };
    if !names::is_dns_label(namespace.get_ref()) {
        let message = format!("exempt.namespace: {:?} can't be the name of one", namespace.get_ref());
        return Err(source.error(namespace.span(), message));
    }
    if let Some(account) = service_account
        && !names::is_dns_subdomain(account.get_ref())
    {
        let message = format!("exempt.service_account: {:?} can't be the name of one", account.get_ref());
        return Err(source.error(account.span(), message));
    }
    Ok(Subject::Pods(Pods {
        namespace: namespace.get_ref().clone(),
        service_account: service_account.as_ref().map(|account| account.get_ref().clone()),
        selector: pod_selector.as_ref().map(|table| Selector::parse(table, source)).transpose()?,
    }))
}

fn parse_interface(glob: &Spanned<String>, source: Source<'_>) -> Result<Subject, ConfigError> {
    let error = |message| source.error(glob.span(), message);
    if glob.get_ref().is_empty() {
        return Err(error("exempt.interface: is empty".to_owned()));
    }
    let compiled = Glob::new(glob.get_ref())
        .map_err(|cause| error(format!("exempt.interface: {:?}: {}", glob.get_ref(), cause.kind())))?;
    Ok(Subject::Interface(NameGlob(compiled.compile_matcher())))
}

/// A path must say what it means, and not mean everything.
fn parse_path(
    written: &Spanned<String>,
    key: &str,
    must_be_absolute: bool,
    source: Source<'_>,
) -> Result<PathBuf, ConfigError> {
    let path = Path::new(written.get_ref());
    let is_plain = path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    let complaint = if must_be_absolute && !path.is_absolute() {
        "is no absolute path"
    } else if !is_plain {
        "has `.` or `..` in it"
    } else if path.file_name().is_none() {
        "names nothing"
    } else {
        return Ok(path.to_owned());
    };
    Err(source.error(written.span(), format!("exempt.{key}: {:?} {complaint}", written.get_ref())))
}

fn parse_endpoints(
    names: &Spanned<Vec<Spanned<String>>>,
    source: Source<'_>,
) -> Result<(Scope, Vec<(String, Place)>), ConfigError> {
    let mut scope = BTreeSet::new();
    for name in names.get_ref() {
        if !scope.insert(name.get_ref().clone()) {
            let message = format!("exempt.endpoints: {:?} is there twice", name.get_ref());
            return Err(source.error(name.span(), message));
        }
    }
    if scope.is_empty() {
        let message = "exempt.endpoints: is empty; leave it out to mean all";
        return Err(source.error(names.span(), message.to_owned()));
    }
    let places = names.get_ref().iter().map(|name| (name.get_ref().clone(), source.place(name.span())));
    Ok((Scope::Named(scope), places.collect()))
}

#[cfg(test)]
mod tests;
