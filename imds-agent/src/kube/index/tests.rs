use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::{config::Config, provider::Dmi};

const RULES: &str = "
    [[endpoint]]
    name = 'vault'
    address = '10.0.0.9'
    [[exempt]]
    name = 'all-of-a'
    namespace = 'a'
    service_account = 'trusted'
    [[exempt]]
    name = 'labelled'
    namespace = 'b'
    pod_selector = { match_labels = { app = 'x' } }
    endpoints = ['imds']
    [[exempt]]
    name = 'seen'
    namespace = 'b'
    audit = true
    [[exempt]]
    name = 'no-pod'
    netns = '/run/netns/x'";

fn rules(text: &str) -> Vec<Exempt> {
    let config = Config::parse(text, Path::new("imds.toml")).unwrap();
    config.exempt.resolve(&config.endpoints.resolve(&Dmi::default()).unwrap()).unwrap()
}

fn pod(uid: &str, namespace: &str, service_account: &str, app: &str) -> Pod {
    Pod {
        uid: uid.to_owned(),
        cgroup_uid: uid.to_owned(),
        namespace: namespace.to_owned(),
        name: format!("pod-{uid}"),
        service_account: service_account.to_owned(),
        labels: [("app".to_owned(), app.to_owned())].into(),
        ..Pod::default()
    }
}

fn granted(index: &Index, uid: &str) -> [bool; 4] {
    let exemption = index.get(uid).map_or(Exemption::NONE, |(_, exemption)| exemption.clone());
    let (exempt, audited) = (&exemption.exempt, &exemption.audited);
    [exempt.has("imds"), exempt.has("vault"), audited.has("imds"), audited.has("vault")]
}

#[test]
fn only_the_operators_rules_grant_anything() {
    let mut index = Index::new(rules(RULES));
    for (uid, namespace, account, app, expected) in [
        ("0", "a", "trusted", "", [true, true, false, false]),
        ("1", "a", "default", "x", [false; 4]),
        ("2", "b", "trusted", "x", [true, false, true, true]),
        ("3", "b", "trusted", "y", [false, false, true, true]),
        ("4", "c", "trusted", "x", [false; 4]),
    ] {
        assert_eq!(granted(&index, uid), [false; 4], "{uid} before it is known");
        assert_eq!(index.apply(pod(uid, namespace, account, app)).len(), 1);
        assert_eq!(granted(&index, uid), expected, "{uid}");
    }
    assert_eq!(index.get("2").unwrap().1.rules.iter().collect::<Vec<_>>(), ["labelled", "seen"]);
    let mut none = Index::new(Vec::new());
    none.apply(pod("0", "a", "trusted", "x"));
    assert!(none.get("0").unwrap().1.is_none());
}

#[test]
fn an_exemption_ends_with_what_it_was_for() {
    let mut index = Index::new(rules(RULES));
    let good = pod("0", "b", "", "x");
    for bad in [
        pod("0", "b", "", "y"),
        pod("0", "c", "", "x"),
        Pod { labels: BTreeMap::new(), ..good.clone() },
        Pod { is_over: true, ..good.clone() },
    ] {
        index.apply(good.clone());
        assert!(granted(&index, "0")[0]);
        let changes = index.apply(bad);
        assert!(!granted(&index, "0")[0]);
        assert!(matches!(&changes[..], [change] if change.before.exempt.has("imds")
            && !change.after.exempt.has("imds") && !change.is_gone));
    }
    index.apply(good.clone());
    let changes = index.delete("0");
    assert!(matches!(&changes[..], [change] if change.is_gone && change.before.exempt.has("imds")
        && change.after == Exemption::NONE && *change.pod == good));
    assert!(index.get("0").is_none() && index.delete("0").is_empty());
}

#[test]
fn what_differs_is_reported_and_nothing_else() {
    let mut index = Index::new(rules(RULES));
    let mut pods: Vec<_> = (0..1000).map(|n| pod(&n.to_string(), "b", "", "x")).collect();
    assert_eq!(index.relist(pods.clone()).len(), 1000);
    assert!(index.relist(pods.clone()).is_empty());
    assert!(index.apply(pods[7].clone()).is_empty());
    pods[7].labels.clear();
    let changes = index.relist(pods.clone());
    assert!(matches!(&changes[..], [change] if change.pod.uid == "7" && !change.after.exempt.has("imds")));
    let gone = pods.swap_remove(8);
    let changes = index.relist(pods);
    assert!(matches!(&changes[..], [change] if change.is_gone && change.pod.uid == gone.uid));
}

#[test]
fn of_other_rules_only_what_differs_is_reported() {
    let mut index = Index::new(rules(RULES));
    index.relist(vec![pod("0", "a", "trusted", ""), pod("1", "b", "", "x"), pod("2", "c", "", "")]);
    assert!(index.set_rules(rules(RULES)).is_empty());
    let changes = index.set_rules(rules("[[exempt]]\nname = 'all-of-a'\nnamespace = 'a'"));
    assert!(matches!(&changes[..], [change] if change.pod.uid == "1" && change.after.is_none()));
    assert_eq!(index.set_rules(Vec::new()).len(), 1);
}

#[test]
fn a_cgroup_that_two_pods_claim_is_neithers() {
    let mut index = Index::new(rules(RULES));
    let first = Pod { cgroup_uid: "hash".to_owned(), ..pod("0", "a", "trusted", "") };
    let second = Pod { cgroup_uid: "hash".to_owned(), ..pod("1", "c", "", "") };
    index.apply(first.clone());
    assert!(granted(&index, "0")[0] && index.by_cgroup_uid("hash") == Some(&first));
    assert_eq!(index.apply(second.clone()).len(), 2);
    assert!(!granted(&index, "0")[0] && index.by_cgroup_uid("hash").is_none());
    let changes = index.delete("1");
    assert!(changes.len() == 2 && granted(&index, "0")[0]);
    assert_eq!(index.apply(second.clone()).len(), 2);
    assert_eq!(index.apply(Pod { cgroup_uid: "other".to_owned(), ..second }).len(), 2);
    assert!(granted(&index, "0")[0]);
}

#[derive(Clone, Debug)]
enum Step {
    Apply(Pod),
    Delete(String),
    Relist(Vec<Pod>),
    Rules(usize),
}

/// Few enough of each that they meet.
fn any_pod() -> impl Strategy<Value = Pod> {
    ("[0-5]", "[abc]", prop_oneof![Just("trusted"), Just("")], "[xy]", "[0-5]", any::<bool>()).prop_map(
        |(uid, namespace, account, app, cgroup_uid, is_over)| Pod {
            cgroup_uid,
            is_over,
            ..pod(&uid, &namespace, account, &app)
        },
    )
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => any_pod().prop_map(Step::Apply),
        2 => "[0-5]".prop_map(Step::Delete),
        1 => prop::collection::vec(any_pod(), 0..6).prop_map(Step::Relist),
        1 => (0..3_usize).prop_map(Step::Rules),
    ]
}

proptest! {
    #[test]
    fn however_it_came_about_it_is_what_a_new_one_would_be(steps in prop::collection::vec(any_step(), 0..24)) {
        let sets = [rules(RULES), rules("[[exempt]]\nname = 'b'\nnamespace = 'b'"), Vec::new()];
        let mut index = Index::new(sets[0].clone());
        let mut in_force = &sets[0];
        let mut pods: BTreeMap<String, Pod> = BTreeMap::new();
        let mut told: BTreeMap<String, Exemption> = BTreeMap::new();
        for step in steps {
            let changes = match step {
                Step::Apply(pod) => {
                    pods.insert(pod.uid.clone(), pod.clone());
                    index.apply(pod)
                }
                Step::Delete(uid) => {
                    pods.remove(&uid);
                    index.delete(&uid)
                }
                Step::Relist(list) => {
                    pods = list.iter().map(|pod| (pod.uid.clone(), pod.clone())).collect();
                    index.relist(list)
                }
                Step::Rules(number) => {
                    in_force = &sets[number];
                    index.set_rules(in_force.clone())
                }
            };
            for Change { pod, is_gone, before, after } in changes {
                prop_assert_eq!(before, told.get(&pod.uid).cloned().unwrap_or(Exemption::NONE));
                if is_gone {
                    told.remove(&pod.uid);
                } else {
                    told.insert(pod.uid.clone(), after);
                }
            }
        }
        let mut anew = Index::new(in_force.clone());
        anew.relist(pods.values().cloned().collect());
        let states = |index: &Index| {
            index.pods().map(|(pod, exemption)| (pod.clone(), exemption.clone())).collect::<Vec<_>>()
        };
        prop_assert_eq!(states(&index), states(&anew));
        prop_assert_eq!(index.claims, anew.claims);
        prop_assert_eq!(told, anew.pods.into_iter().map(|(uid, entry)| (uid, entry.exemption)).collect());
    }
}
