//! Kubernetes API decoder: any response of an API server exempts only pods that a rule selects.

use std::{collections::BTreeSet, path::Path, sync::LazyLock};

use imds_agent::{
    config::{Config, Exempt, NamespaceSelector, PodSelector, RuleSubject, provider::Dmi},
    kube::{Index, NamespaceEvent, Pod, PodEvent},
};

const NODE: &str = "node-0";
const CONFIG: &str = "
    [[exempt]]
    name = 'agents'
    namespace = 'kube-system'
    service_account = 'agent'
    pod_selector = { match_labels = { app = 'agent' }, match_expressions = [{ key = 'tier', operator = 'NotIn', values = ['x'] }] }
    [[exempt]]
    name = 'all'
    namespace = 'monitoring'
    [[exempt]]
    name = 'team'
    namespace_selector = { match_labels = { team = 'a' } }
    service_account = 'agent'
    [kubernetes]
    enabled = 'yes'";

pub(crate) fn run(bytes: &[u8]) {
    let (mut index, node, keys) = (Index::default(), NODE.to_owned(), BTreeSet::from(["team".to_owned()]));
    for line in bytes.split(|&byte| byte == b'\n') {
        let namespaces = [NamespaceEvent::from_line(line, &keys).ok().flatten(), namespace_list(line, &keys)];
        for event in namespaces.into_iter().flatten() {
            index.handle_namespaces(event, &keys);
        }
        let (from_line, from_list) = (PodEvent::from_line(line, &node), PodEvent::from_list(line, &node));
        for event in [from_line.ok().flatten(), from_list.ok()].into_iter().flatten() {
            index.handle(event);
            for rule in &*RULES {
                for pod in index.matching(rule) {
                    assert_meant(pod, rule, &index);
                }
            }
        }
    }
}

fn namespace_list(line: &[u8], keys: &BTreeSet<String>) -> Option<NamespaceEvent> {
    NamespaceEvent::from_list(line, keys).ok()
}

/// Parsed once, because parsing rules takes longer than decoding a response.
static RULES: LazyLock<Vec<PodSelector>> = LazyLock::new(|| {
    let config = Config::parse(CONFIG, Path::new("rules")).expect("a configuration");
    let (_, exempt) = config.resolve(&Dmi::default()).expect("a configuration");
    let of_pods = |exempt: Exempt| match exempt.sender {
        RuleSubject::Pods(pods) => Some(pods),
        RuleSubject::Interface(_) | RuleSubject::Netns(_) | RuleSubject::Cgroup(_) => None,
    };
    exempt.into_iter().filter_map(of_pods).collect()
});

fn assert_meant(pod: &Pod, rule: &PodSelector, index: &Index) {
    assert!(!pod.is_terminated, "{pod:?}");
    match &rule.namespace {
        NamespaceSelector::Name(name) => assert_eq!(pod.namespace, *name, "{pod:?}"),
        NamespaceSelector::Labels(labels) => {
            assert!(index.namespaces().matches(&pod.namespace, labels), "{pod:?}");
        }
    }
    let label = |key: &str| pod.labels.get(key);
    if rule.selector.is_some() {
        assert!(pod.service_account == "agent" && label("app") == Some("agent"), "{pod:?}");
        assert!(label("tier") != Some("x"), "{pod:?}");
    }
    let claims = index.pods().filter(|other| other.cgroup_uid == pod.cgroup_uid);
    assert_eq!(claims.count(), 1, "{pod:?}");
}
