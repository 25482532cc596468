use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::{config::Config, provider::Dmi};

fn resolve(text: &str) -> Result<Vec<Exempt>, String> {
    let rules = || {
        let config = Config::parse(text, Path::new("imds.toml"))?;
        config.exempt.resolve(&config.endpoints.resolve(&Dmi::default())?)
    };
    rules().map_err(|error: ConfigError| error.to_string())
}

fn one(lines: &str) -> Exempt {
    resolve(&format!("[[exempt]]\nname = 'a'\n{lines}")).unwrap().remove(0)
}

fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())).collect()
}

fn selector(toml: &str) -> Selector {
    match one(&format!("namespace = 'n'\npod_selector = {toml}")).subject {
        Subject::Pods(pods) => pods.selector.unwrap(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn each_way_to_say_who() {
    assert!(resolve("").unwrap().is_empty());
    let Subject::Interface(glob) = one("interface = 'veth[0-3]'").subject else { panic!("an interface") };
    assert!(glob.matches("veth3") && !glob.matches("veth4"));
    assert_eq!(one("netns = '/run/netns/x'").subject, Subject::Netns("/run/netns/x".into()));
    assert_eq!(one("cgroup = 'system.slice/x'").subject, Subject::Cgroup("system.slice/x".into()));
    let rule = one("namespace = 'kube-system'\nservice_account = 'csi'\nendpoints = ['imds']\naudit = true");
    let pods = Pods { namespace: "kube-system".into(), service_account: Some("csi".into()), selector: None };
    assert_eq!(rule.subject, Subject::Pods(pods));
    assert!(rule.audit && rule.endpoints.has("imds") && !rule.endpoints.has("vault"));
    assert_eq!((one("netns = '/n'").endpoints, one("netns = '/n'").audit), (Scope::All, false));
}

#[test]
fn labels_are_matched_as_kubernetes_does() {
    let both = selector("{ match_labels = { app = 'x', 'k8s.io/tier' = '' } }");
    assert!(both.matches(&labels(&[("app", "x"), ("k8s.io/tier", ""), ("z", "z")])));
    assert!(!both.matches(&labels(&[("app", "x")])) && !both.matches(&labels(&[("app", "y")])));
    let condition = |rest: &str| selector(&format!("{{ match_expressions = [{{ key = 'app', {rest} }}] }}"));
    for (rest, x, z, none) in [
        ("operator = 'In', values = ['x', 'y']", true, false, false),
        ("operator = 'NotIn', values = ['x', 'y']", false, true, true),
        ("operator = 'Exists'", true, true, false),
        ("operator = 'DoesNotExist'", false, false, true),
    ] {
        let matches = [labels(&[("app", "x")]), labels(&[("app", "z")]), labels(&[("b", "x")])]
            .map(|labels| condition(rest).matches(&labels));
        assert_eq!(matches, [x, z, none], "{rest}");
    }
    assert_eq!(selector("{ match_labels = { app = 'x' } }"), condition("operator = 'In', values = ['x']"));
}

#[test]
fn rules_that_make_no_sense_are_named() {
    let rule = |lines: &str| format!("[[exempt]]\nname = 'a'\n{lines}");
    let pods = |selector: &str| rule(&format!("namespace = 'n'\npod_selector = {selector}"));
    let two = |first: &str, second: &str| format!("{}\n[[exempt]]\nname = 'b'\n{second}", rule(first));
    for (text, place, part) in [
        ("[[exempt]]\nnetns = '/n'".to_owned(), "1:1", "name"),
        ("[[exempt]]\nname = ''\nnetns = '/n'".to_owned(), "2:8", "exempt.name"),
        (rule("netns = '/n'\n[[exempt]]\nname = 'a'\nnetns = '/m'"), "5:8", "twice"),
        (rule("pod = 'x'"), "3:1", "pod"),
        (rule(""), "2:8", "says not whom"),
        (rule("netns = '/n'\ncgroup = 'c'"), "4:10", "only one"),
        (rule("namespace = 'n'\ninterface = 'v*'"), "4:13", "only one"),
        (rule("service_account = 's'"), "3:19", "need a namespace"),
        (rule("netns = '/n'\npod_selector = { match_labels = { a = 'b' } }"), "4:16", "need a namespace"),
        (rule("interface = 'veth['"), "3:13", "veth["),
        (rule("interface = ''"), "3:13", "empty"),
        (rule("interface = \"v\\n[\""), "3:13", "v\\n["),
        (rule("netns = 'n'"), "3:9", "absolute"),
        (rule("netns = \"a\\nb\""), "3:9", "a\\nb"),
        (rule("netns = '/run/../n'"), "3:9", ".."),
        (rule("cgroup = '/'"), "3:10", "names nothing"),
        (rule("cgroup = '.'"), "3:10", "`.`"),
        (rule("cgroup = ''"), "3:10", "names nothing"),
        (rule("namespace = '*'"), "3:13", "exempt.namespace"),
        (rule("namespace = 'n'\nservice_account = 'S'"), "4:19", "exempt.service_account"),
        (pods("{}"), "4:16", "nothing in particular"),
        (pods("{ match_labels = {} }"), "4:16", "nothing in particular"),
        (pods("{ match_lables = {} }"), "4:18", "match_lables"),
        (pods("{ match_labels = { '-a' = 'b' } }"), "4:35", "key of a label"),
        (pods("{ match_labels = { a = 'b c' } }"), "4:39", "value of a label"),
        (pods("{ match_expressions = [{ key = 'a', operator = 'in' }] }"), "4:63", "`in`"),
        (pods("{ match_expressions = [{ key = 'a', operator = 'In' }] }"), "4:63", "need"),
        (pods("{ match_expressions = [{ key = 'a', operator = 'In', values = [] }] }"), "4:78", "empty"),
        (
            pods("{ match_expressions = [{ key = 'a', operator = 'Exists', values = ['b'] }] }"),
            "4:82",
            "none",
        ),
        (rule("netns = '/n'\nendpoints = []"), "4:13", "empty"),
        (rule("netns = '/n'\nendpoints = ['imds', 'imds']"), "4:22", "twice"),
        (rule("netns = '/n'\nendpoints = ['vault']"), "4:14", "\"vault\""),
        (rule("netns = '/n'\naudit = 'yes'"), "4:9", "yes"),
        (two("netns = '/n'\naudit = true", "netns = '/n'\nendpoints = ['imds']"), "6:8", "one audits"),
        (rule("namespace = 'n'\n[kubernetes]\nenabled = 'no'"), "2:8", "kubernetes.enabled"),
    ] {
        let error = resolve(&text).unwrap_err();
        assert!(
            error.starts_with(&format!("imds.toml:{place}: ")) && error.contains(part),
            "{text}: {error}"
        );
    }
}

#[test]
fn rules_for_one_subject_need_not_contradict_each_other() {
    let own = "[[endpoint]]\nname = 'vault'\naddress = '10.0.0.9'\n";
    let rule =
        |name: &str, rest: &str| format!("[[exempt]]\nname = '{name}'\ncgroup = 'c'\nendpoints = ['{rest}\n");
    let text = format!("{own}{}{}", rule("a", "imds']"), rule("b", "vault']\naudit = true"));
    assert_eq!(resolve(&text).unwrap().len(), 2);
    let text = format!("{own}{}{}", rule("a", "imds']"), rule("b", "imds']"));
    assert_eq!(resolve(&text).unwrap().len(), 2);
}

proptest! {
    #[test]
    fn a_union_has_what_either_has(a in scope(), b in scope(), name in "[a-d]") {
        prop_assert_eq!(a.clone().union(&b).has(&name), a.has(&name) || b.has(&name));
        prop_assert_eq!(a.is_none(), ["a", "b", "c", "d"].iter().all(|name| !a.has(name)));
    }
}

fn scope() -> impl Strategy<Value = Scope> {
    prop_oneof![Just(Scope::All), prop::collection::btree_set("[a-d]", 0..4).prop_map(Scope::Named)]
}
