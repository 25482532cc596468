//! Namespaces of the cluster, as far as exemption rules need them.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use super::{
    pod::StringMap,
    resource::{Parsed, Resource},
};
use crate::config::Selector;

/// Name and labels of a namespace.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Namespace {
    /// Name, unique within the cluster.
    pub name: String,
    /// Labels that rules use. Tenants may set any number of other ones.
    pub labels: StringMap,
}

/// Namespace object of the API.
#[derive(Debug, Deserialize)]
pub struct NamespaceObject {
    metadata: Metadata,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Metadata {
    name: String,
    resource_version: Option<String>,
    labels: Option<BTreeMap<String, String>>,
}

impl Resource for Namespace {
    type Object = NamespaceObject;
    /// Keys of the labels that rules use.
    type Scope = BTreeSet<String>;

    const PATH: &'static str = "/api/v1/namespaces";
    const KIND: &'static str = "namespace";
    const ALL: &'static str = "namespaces";
    /// Kubernetes supports 10,000 namespaces.
    const MAX: usize = 65_536;
    const METADATA_ONLY: bool = true;
    const IF_FORBIDDEN: &'static str =
        ": a rule with namespace_selector needs a ClusterRole that allows list and watch of namespaces";

    fn field_selector(_: &Self::Scope) -> Option<String> {
        None
    }

    fn parse(NamespaceObject { metadata }: Self::Object, keys: &Self::Scope) -> Parsed<Self> {
        let Metadata { name, resource_version, labels } = metadata;
        let labels = labels.into_iter().flatten().filter(|(key, _)| keys.contains(key)).collect();
        Parsed { key: name.clone(), version: resource_version, value: Some(Self { name, labels }) }
    }
}

/// Labels of the known namespaces.
#[derive(Clone, Debug, Default)]
pub struct NamespaceIndex {
    /// Keys of the labels that are known. Labels with other keys are unknown, not absent.
    keys: BTreeSet<String>,
    labels: BTreeMap<String, StringMap>,
}

impl NamespaceIndex {
    /// Applies an event of a watch that reports the labels with these `keys`. Returns the names of the namespaces that are
    /// new, deleted or changed.
    pub(super) fn handle(&mut self, event: NamespaceEvent, keys: &BTreeSet<String>) -> BTreeSet<String> {
        match event {
            NamespaceEvent::Relist(namespaces) => self.relist(namespaces, keys),
            NamespaceEvent::Apply(Namespace { name, labels }) => {
                let previous = self.labels.get(&name);
                if previous == Some(&labels) || previous.is_none() && self.labels.len() >= Namespace::MAX {
                    return BTreeSet::new();
                }
                self.labels.insert(name.clone(), labels);
                [name].into()
            }
            NamespaceEvent::Delete { key } => {
                self.labels.remove_entry(&key).into_iter().map(|(name, _)| name).collect()
            }
        }
    }

    /// Returns the number of known namespaces.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Reports whether no namespace is known.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// Reports whether the labels that decide about a selector are known.
    pub fn knows(&self, selector: &Selector) -> bool {
        selector.keys().all(|key| self.keys.contains(key))
    }

    /// Reports whether the labels of a namespace match. A namespace that is not known completely matches no selector.
    pub fn matches(&self, namespace: &str, selector: &Selector) -> bool {
        let labels = self.labels.get(namespace).filter(|_| self.knows(selector));
        labels.is_some_and(|labels| selector.matches(|key| labels.get(key)))
    }

    fn relist(&mut self, namespaces: Vec<Namespace>, keys: &BTreeSet<String>) -> BTreeSet<String> {
        let named =
            namespaces.into_iter().take(Namespace::MAX).map(|Namespace { name, labels }| (name, labels));
        let labels: BTreeMap<_, _> = named.collect();
        let both = self.labels.keys().chain(labels.keys());
        // The known labels of a namespace may be equal, and still match another selector.
        let is_changed = |name: &&String| self.keys != *keys || self.labels.get(*name) != labels.get(*name);
        let changed = both.filter(is_changed).cloned().collect();
        (self.keys, self.labels) = (keys.clone(), labels);
        changed
    }
}

/// Change of the cluster's namespaces.
pub type NamespaceEvent = super::ObjectEvent<Namespace>;

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::{
        config::{Config, NamespaceSelector, RuleSubject, provider::Dmi},
        kube::ErrorKind,
    };

    fn selector(lines: &str) -> Selector {
        let text = format!("[[exempt]]\nname = 'a'\nnamespace_selector.{lines}");
        let config = Config::parse(&text, Path::new("imds.toml")).unwrap();
        match config.resolve(&Dmi::default()).unwrap().1.remove(0).sender {
            RuleSubject::Pods(pods) => match pods.namespace {
                NamespaceSelector::Labels(selector) => selector,
                NamespaceSelector::Name(name) => panic!("{name}"),
            },
            other => panic!("{other:?}"),
        }
    }

    fn keys(keys: &[&str]) -> BTreeSet<String> {
        keys.iter().map(|&key| key.to_owned()).collect()
    }

    fn namespace(name: &str, labels: &[(&str, &str)]) -> Namespace {
        let labels = labels.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())).collect();
        Namespace { name: name.to_owned(), labels }
    }

    fn delete(name: &str) -> NamespaceEvent {
        NamespaceEvent::Delete { key: name.to_owned() }
    }

    #[test]
    fn unknown_labels_match_no_selector() {
        let mut index = NamespaceIndex::default();
        let team = [namespace("a", &[("team", "x")]), namespace("b", &[("team", "")]), namespace("c", &[])];
        let cases = [
            ("match_labels = { team = 'x' }", &["a"][..]),
            ("match_labels = { team = '' }", &["b"]),
            ("match_expressions = [{ key = 'team', operator = 'In', values = ['x', 'y'] }]", &["a"]),
            ("match_expressions = [{ key = 'team', operator = 'NotIn', values = ['x'] }]", &["b", "c"]),
            ("match_expressions = [{ key = 'team', operator = 'Exists' }]", &["a", "b"]),
            ("match_expressions = [{ key = 'team', operator = 'DoesNotExist' }]", &["c"]),
            // Nothing is known about the label `other`.
            ("match_expressions = [{ key = 'other', operator = 'DoesNotExist' }]", &[]),
            ("match_labels = { team = 'x' }\nnamespace_selector.match_expressions = [{ key = 'other', operator = 'DoesNotExist' }]", &[]),
        ]
        .map(|(lines, expected)| (selector(lines), expected));
        let matching = |index: &NamespaceIndex, selector: &Selector| -> Vec<_> {
            ["a", "b", "c", "d"].into_iter().filter(|name| index.matches(name, selector)).collect()
        };
        for (selector, _) in &cases {
            assert!(matching(&index, selector).is_empty(), "{selector:?}");
        }
        index.handle(NamespaceEvent::Relist(team.to_vec()), &keys(&["team"]));
        for (selector, expected) in &cases {
            assert_eq!(matching(&index, selector), *expected, "{selector:?}");
        }
    }

    #[test]
    fn changes_name_the_namespaces() {
        let (mut index, team) = (NamespaceIndex::default(), keys(&["team"]));
        let both = [namespace("a", &[("team", "x")]), namespace("b", &[])];
        let both = || NamespaceEvent::Relist(both.to_vec());
        for (event, label_keys, expected) in [
            (both(), &team, &["a", "b"][..]),
            (both(), &team, &[]),
            (NamespaceEvent::Apply(namespace("b", &[])), &team, &[]),
            (NamespaceEvent::Apply(namespace("b", &[("team", "x")])), &team, &["b"]),
            (NamespaceEvent::Apply(namespace("c", &[])), &team, &["c"]),
            (delete("c"), &team, &["c"]),
            (delete("c"), &team, &[]),
            (both(), &team, &["b"]),
            // Equal labels may match other selectors than before.
            (both(), &keys(&["team", "other"]), &["a", "b"]),
            (NamespaceEvent::Relist(Vec::new()), &keys(&["team", "other"]), &["a", "b"]),
        ] {
            let found = index.handle(event.clone(), label_keys);
            assert!(found.iter().eq(expected), "{event:?}: {found:?}");
        }
        assert!(index.is_empty());
    }

    #[test]
    fn number_of_namespaces_is_bounded() {
        let (mut index, team) = (NamespaceIndex::default(), keys(&["team"]));
        let all = (0..=Namespace::MAX).map(|number| namespace(&number.to_string(), &[])).collect();
        index.handle(NamespaceEvent::Relist(all), &team);
        assert_eq!(index.len(), Namespace::MAX);
        assert!(index.handle(NamespaceEvent::Apply(namespace("new", &[])), &team).is_empty());
        assert_eq!(index.handle(NamespaceEvent::Apply(namespace("0", &[("team", "x")])), &team).len(), 1);
        index.handle(delete("1"), &team);
        assert_eq!(index.handle(NamespaceEvent::Apply(namespace("new", &[])), &team).len(), 1);
    }

    #[test]
    fn only_used_labels_are_kept() {
        let team = keys(&["team"]);
        let list = br#"{"metadata":{"resourceVersion":"7"},"items":[
            {"metadata":{"name":"a","labels":{"team":"x","other":"y"}},"spec":{"finalizers":["kubernetes"]},"status":{"phase":"Active"}},
            {"metadata":{"name":"b"}}]}"#;
        let expected = NamespaceEvent::Relist(vec![namespace("a", &[("team", "x")]), namespace("b", &[])]);
        assert_eq!(NamespaceEvent::from_list(list, &team), Ok(expected));
        let event = |kind: &str| {
            let line = format!(
                r#"{{"type":"{kind}","object":{{"metadata":{{"name":"a","resourceVersion":"8"}}}}}}"#
            );
            NamespaceEvent::from_line(line.as_bytes(), &team)
        };
        assert_eq!(event("MODIFIED"), Ok(Some(NamespaceEvent::Apply(namespace("a", &[])))));
        assert_eq!(event("DELETED"), Ok(Some(delete("a"))));
        assert_eq!(event("BOOKMARK"), Ok(None));
        assert_eq!(event("MOVED"), Err(ErrorKind::Malformed));
        let nameless = br#"{"type":"ADDED","object":{"metadata":{"resourceVersion":"8"}}}"#;
        assert_eq!(NamespaceEvent::from_line(nameless, &team), Err(ErrorKind::Malformed));
    }
}
