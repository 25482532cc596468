use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::{
    config::{Config, RuleSubject, provider::Dmi},
    kube::Namespace,
};

fn rule(lines: &str) -> PodSelector {
    let config = Config::parse(&format!("[[exempt]]\nname = 'a'\n{lines}"), Path::new("imds.toml")).unwrap();
    match config.resolve(&Dmi::default()).unwrap().1.remove(0).sender {
        RuleSubject::Pods(pods) => pods,
        other => panic!("{other:?}"),
    }
}

fn pod(uid: &str, namespace: &str, service_account: &str, app: &str) -> Pod {
    Pod {
        uid: uid.to_owned(),
        cgroup_uid: uid.to_owned(),
        namespace: namespace.to_owned(),
        name: format!("pod-{uid}"),
        service_account: service_account.to_owned(),
        labels: [("app".to_owned(), app.to_owned())].into_iter().collect(),
        ..Pod::default()
    }
}

fn index(pods: impl IntoIterator<Item = Pod>) -> Index {
    let mut index = Index::default();
    index.handle(PodEvent::Relist(pods.into_iter().collect()));
    index
}

fn matching(index: &Index, rule: &PodSelector) -> Vec<String> {
    index.matching(rule).map(|pod| pod.uid.clone()).collect()
}

#[test]
fn pod_limit_makes_the_index_unknown() {
    let mut index = index((0..MAX_PODS).map(|number| pod(&number.to_string(), "a", "s", "x")));
    let rule = rule("namespace = 'a'");
    assert_eq!(index.handle(PodEvent::Apply(pod("new", "a", "s", "x"))), BTreeSet::new());
    assert!(index.get("new").is_none() && index.matching(&rule).count() == MAX_PODS);
    assert_eq!(index.handle(PodEvent::Apply(pod("0", "a", "s", "y"))).len(), 1);
    index.handle(PodEvent::Delete { key: "1".to_owned() });
    assert_eq!(index.handle(PodEvent::Apply(pod("new", "a", "s", "x"))).len(), 1);
}

#[test]
fn rule_matches_its_namespace_only() {
    let pods =
        [pod("0", "a", "s", "x"), pod("1", "b", "s", "x"), pod("2", "a", "t", "y"), pod("3", "a", "s", "z")];
    let index = index(pods);
    for (lines, expected) in [
        ("namespace = 'a'", &["0", "2", "3"][..]),
        ("namespace = 'a'\nservice_account = 's'", &["0", "3"]),
        ("namespace = 'a'\npod_selector.match_labels = { app = 'x' }", &["0"]),
        ("namespace = 'a'\nservice_account = 't'\npod_selector.match_labels = { app = 'x' }", &[]),
        (
            "namespace = 'a'\npod_selector.match_expressions = [{ key = 'app', operator = 'In', values = ['x', 'y'] }]",
            &["0", "2"],
        ),
        (
            "namespace = 'a'\npod_selector.match_expressions = [{ key = 'app', operator = 'NotIn', values = ['x'] }]",
            &["2", "3"],
        ),
        (
            "namespace = 'a'\npod_selector.match_expressions = [{ key = 'app', operator = 'Exists' }]",
            &["0", "2", "3"],
        ),
        (
            "namespace = 'a'\npod_selector.match_expressions = [{ key = 'app', operator = 'DoesNotExist' }]",
            &[],
        ),
        ("namespace = 'c'", &[]),
    ] {
        assert_eq!(matching(&index, &rule(lines)), expected, "{lines}");
    }
}

#[test]
fn namespace_labels_exempt_pods() {
    let with = |labels: &[(&str, &str)]| {
        let labels = labels.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())).collect();
        NamespaceEvent::Apply(Namespace { name: "a".to_owned(), labels })
    };
    let rule = rule("namespace_selector.match_labels = { team = 'x' }\nservice_account = 's'");
    let mut index = index([pod("0", "a", "s", "x"), pod("1", "a", "t", "x"), pod("2", "b", "s", "x")]);
    let keys = BTreeSet::from(["team".to_owned()]);
    let mut handle = |event| (index.handle_namespaces(event, &keys), matching(&index, &rule));
    // Nothing is known before the first list.
    assert_eq!(handle(with(&[("team", "x")])), (true, Vec::new()));
    assert_eq!(handle(NamespaceEvent::Relist(Vec::new())), (true, Vec::new()));
    assert_eq!(handle(with(&[("team", "x")])), (true, vec!["0".to_owned()]));
    assert_eq!(handle(NamespaceEvent::Delete { key: "c".to_owned() }), (false, vec!["0".to_owned()]));
    let unused = Namespace { name: "c".to_owned(), ..Namespace::default() };
    assert_eq!(handle(NamespaceEvent::Apply(unused)), (false, vec!["0".to_owned()]));
    assert_eq!(handle(with(&[])), (true, Vec::new()));
    assert_eq!(handle(with(&[("team", "x")])), (true, vec!["0".to_owned()]));
    assert_eq!(handle(NamespaceEvent::Delete { key: "a".to_owned() }), (true, Vec::new()));
    assert_eq!(handle(with(&[("team", "x")])), (true, vec!["0".to_owned()]));
    index.clear_namespaces();
    assert!(matching(&index, &rule).is_empty() && index.get("0").is_some());
}

#[test]
fn repeated_events_change_nothing() {
    let mut index = index([pod("0", "a", "s", "x"), pod("1", "a", "s", "x")]);
    assert!(index.handle(PodEvent::Apply(pod("0", "a", "s", "x"))).is_empty());
    assert!(index.handle(PodEvent::Delete { key: "7".to_owned() }).is_empty());
    let all: Vec<_> = index.pods().cloned().collect();
    assert!(index.handle(PodEvent::Relist(all)).is_empty());
    let changed = index.handle(PodEvent::Relist(vec![pod("0", "a", "s", "y"), pod("2", "a", "s", "x")]));
    assert_eq!(changed, ["0", "1", "2"].map(str::to_owned).into());
}

#[test]
fn label_removal_and_end_revoke_exemption() {
    let rule = rule("namespace = 'a'\npod_selector.match_labels = { app = 'x' }");
    let mut index = index([pod("0", "a", "s", "x"), pod("1", "a", "s", "x")]);
    index.handle(PodEvent::Apply(pod("0", "a", "s", "")));
    assert_eq!(matching(&index, &rule), ["1"]);
    index.handle(PodEvent::Apply(Pod { is_terminated: true, ..pod("1", "a", "s", "x") }));
    assert!(matching(&index, &rule).is_empty() && index.get("1").is_some());
}

#[test]
fn undated_cgroup_claims_have_no_owner() {
    let rule = rule("namespace = 'a'");
    let first = Pod { cgroup_uid: "hash".to_owned(), ..pod("0", "a", "s", "") };
    let second = Pod { cgroup_uid: "hash".to_owned(), ..pod("1", "c", "s", "") };
    let mut index = index([first]);
    assert_eq!(matching(&index, &rule), ["0"]);
    index.handle(PodEvent::Apply(second.clone()));
    assert!(matching(&index, &rule).is_empty());
    index.handle(PodEvent::Apply(Pod { cgroup_uid: "other".to_owned(), ..second.clone() }));
    assert_eq!(matching(&index, &rule), ["0"]);
    index.handle(PodEvent::Apply(second));
    index.handle(PodEvent::Delete { key: "1".to_owned() });
    assert_eq!(matching(&index, &rule), ["0"]);
}

#[test]
fn oldest_pod_owns_disputed_cgroup() {
    let rule = rule("namespace = 'a'");
    let claimant = |uid: &str, namespace: &str, created: &str| Pod {
        cgroup_uid: "hash".to_owned(),
        created: created.parse().ok(),
        ..pod(uid, namespace, "s", "")
    };
    let (old, new) = ("2026-11-23T15:04:05Z", "2026-11-23T15:04:06Z");
    let mut index = index([claimant("1", "a", old)]);
    assert_eq!(index.disputes().count(), 0);
    for (look_alike, exempt, text) in [
        (
            claimant("0", "c", new),
            &["1"][..],
            "pod c/pod-0 claims the cgroup of the older static pod a/pod-1 with its",
        ),
        (claimant("0", "c", ""), &["1"], "pod c/pod-0 claims the cgroup of"),
        (claimant("0", "c", old), &[], "pod c/pod-0, a/pod-1 claim the same cgroup with their"),
        (
            claimant("2", "c", "2026-11-23T15:04:04Z"),
            &[],
            "pod a/pod-1 claims the cgroup of the older static pod c/pod-2",
        ),
    ] {
        let uid = look_alike.uid.clone();
        index.handle(PodEvent::Apply(look_alike));
        assert_eq!(matching(&index, &rule), exempt, "{text}");
        let disputes: Vec<_> = index.disputes().map(|dispute| dispute.to_string()).collect();
        assert!(matches!(&disputes[..], [dispute] if dispute.starts_with(text)), "{disputes:?}");
        index.handle(PodEvent::Delete { key: uid });
        assert_eq!((matching(&index, &rule), index.disputes().count()), (vec!["1".to_owned()], 0));
    }
}

#[derive(Clone, Debug)]
enum Step {
    Apply(Pod),
    Delete(String),
    Relist(Vec<Pod>),
}

/// Small alphabets, so that pods collide often.
fn any_pod() -> impl Strategy<Value = Pod> {
    ("[0-5]", "[abc]", "[st]", "[xy]", "[0-5]", any::<bool>()).prop_map(
        |(uid, namespace, account, app, cgroup_uid, is_terminated)| Pod {
            cgroup_uid,
            is_terminated,
            created: format!("2026-11-23T15:04:0{uid}Z").parse().ok().filter(|_| namespace != "b"),
            ..pod(&uid, &namespace, &account, &app)
        },
    )
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => any_pod().prop_map(Step::Apply),
        2 => "[0-5]".prop_map(Step::Delete),
        1 => prop::collection::vec(any_pod(), 0..6).prop_map(Step::Relist),
    ]
}

proptest! {
    #[test]
    fn index_is_independent_of_event_order(steps in prop::collection::vec(any_step(), 0..24)) {
        let mut index = Index::default();
        let mut pods: BTreeMap<String, Pod> = BTreeMap::new();
        for step in steps {
            let before = pods.clone();
            let changed = match step {
                Step::Apply(pod) => {
                    pods.insert(pod.uid.clone(), pod.clone());
                    index.handle(PodEvent::Apply(pod))
                }
                Step::Delete(uid) => {
                    pods.remove(&uid);
                    index.handle(PodEvent::Delete { key: uid })
                }
                Step::Relist(list) => {
                    // The later one of two pods with the same UID counts.
                    pods = list.iter().map(|pod| (pod.uid.clone(), pod.clone())).collect();
                    index.handle(PodEvent::Relist(list))
                }
            };
            let differs = |uid: &&String| before.get(*uid) != pods.get(*uid);
            let different: BTreeSet<_> = before.keys().chain(pods.keys()).filter(differs).cloned().collect();
            prop_assert!(different.is_subset(&changed));
        }
        let rebuilt = self::index(pods.into_values());
        prop_assert_eq!(&index.pods, &rebuilt.pods);
        prop_assert_eq!(&index.claims, &rebuilt.claims);
        prop_assert_eq!(&index.contested, &rebuilt.contested);
        for rule in [rule("namespace = 'a'"), rule("namespace = 'b'\nservice_account = 't'")] {
            prop_assert_eq!(matching(&index, &rule), matching(&rebuilt, &rule));
        }
    }
}
