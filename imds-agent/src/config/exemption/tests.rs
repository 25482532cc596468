use super::*;
use crate::config::{Config, provider::Dmi};

fn resolve(text: &str) -> Result<Vec<Exempt>, String> {
    let config = Config::parse(text, Path::new("imds.toml"));
    let resolved = config.and_then(|config| config.resolve(&Dmi::default()));
    resolved.map(|(_, exempt)| exempt).map_err(|error| error.to_string())
}

fn one(lines: &str) -> Exempt {
    resolve(&format!("[[exempt]]\nname = 'a'\n{lines}")).unwrap().remove(0)
}

#[test]
fn every_selector_is_accepted() {
    assert!(resolve("").unwrap().is_empty());
    let RuleSubject::Interface(glob) = one("interface = 'veth[0-3]'").sender else {
        panic!("expected a selector by interface")
    };
    assert!(glob.matches("veth3") && !glob.matches("veth4"));
    assert_eq!(one("netns = '/run/netns/x'").sender, RuleSubject::Netns("/run/netns/x".into()));
    assert_eq!(one("cgroup = 'system.slice/x'").sender, RuleSubject::Cgroup("system.slice/x".into()));
    let rule = one("netns = '/n'");
    assert_eq!((rule.scope, rule.is_audited), (EndpointSelector::All, false));
    let rule = one("netns = '/n'\nendpoints = ['imds']\naudit = true");
    let imds = EndpointSelector::Only(["169.254.169.254".parse().unwrap()].into());
    assert_eq!((rule.scope, rule.is_audited), (imds, true));
}

#[test]
fn invalid_rules_are_reported() {
    let rule = |lines: &str| format!("[[exempt]]\nname = 'a'\n{lines}");
    let two = |first: &str, second: &str| format!("{}\n[[exempt]]\nname = 'b'\n{second}", rule(first));
    for (text, position, part) in [
        ("[[exempt]]\nnetns = '/n'".to_owned(), "1:1", "name"),
        ("[[exempt]]\nname = ''\nnetns = '/n'".to_owned(), "2:8", "exempt.name"),
        (rule("netns = '/n'\n[[exempt]]\nname = 'a'\nnetns = '/m'"), "5:8", "already"),
        (rule("netns = '/n'\npod = 'x'"), "4:1", "pod"),
        (rule(""), "2:8", "missing selector"),
        (rule("netns = '/n'\ncgroup = 'c'"), "2:8", "only one"),
        (rule("interface = 'veth['"), "3:13", "veth["),
        (rule("interface = ''"), "3:13", "matches no interface"),
        (rule("netns = 'n'"), "3:9", "absolute"),
        (rule("netns = '/run/../n'"), "3:9", ".."),
        (rule("cgroup = '/'"), "3:10", "no last component"),
        (rule("cgroup = '.'"), "3:10", "`.`"),
        (rule("cgroup = ''"), "3:10", "no last component"),
        (rule("netns = '/n'\nendpoints = []"), "4:13", "an empty list"),
        (rule("netns = '/n'\nendpoints = ['imds', 'imds']"), "4:22", "twice"),
        (rule("netns = '/n'\nendpoints = ['vault']"), "4:14", "\"vault\""),
        (rule("netns = '/n'\naudit = 'yes'"), "4:9", "yes"),
        (two("netns = '/n'\naudit = true", "netns = '/n'\nendpoints = ['imds']"), "6:8", "contradict"),
        (two("netns = '/n'", "netns = '/n'\nendpoints = ['imds']"), "5:8", "the same"),
    ] {
        let error = resolve(&text).unwrap_err();
        assert!(
            error.starts_with(&format!("imds.toml:{position}: ")) && error.contains(part),
            "{text}: {error}"
        );
    }
}

#[test]
fn rules_for_one_sender_may_differ() {
    let own = "[[endpoint]]\nname = 'vault'\naddress = '10.0.0.9'\n";
    let rule =
        |name: &str, rest: &str| format!("[[exempt]]\nname = '{name}'\ncgroup = 'c'\nendpoints = ['{rest}\n");
    let text = format!("{own}{}{}", rule("a", "imds']"), rule("b", "vault']\naudit = true"));
    assert_eq!(resolve(&text).unwrap().len(), 2);
}

#[test]
fn kubernetes_selectors_match_pods() {
    let of = |lines: &str| match one(lines).sender {
        RuleSubject::Pods(pods) => pods,
        other => panic!("{other:?}"),
    };
    let pods = of("namespace = 'kube-system'");
    assert_eq!(pods.namespace, NamespaceSelector::Name("kube-system".to_owned()));
    assert_eq!((pods.service_account, pods.selector), (None, None));
    let by_label = of("namespace = 'a'\nservice_account = 's'\npod_selector.match_labels = { app = 'x' }");
    assert_eq!(by_label.service_account.as_deref(), Some("s"));
    let by_expression = of("namespace = 'a'\nservice_account = 's'\n\
        pod_selector.match_expressions = [{ key = 'app', operator = 'In', values = ['x'] }]");
    assert_eq!(by_label, by_expression, "equivalent selectors");

    let by_namespace = of("namespace_selector.match_labels = { team = 'x' }\nservice_account = 's'");
    let by_expression = of("service_account = 's'\n\
        namespace_selector.match_expressions = [{ key = 'team', operator = 'In', values = ['x'] }]");
    assert_eq!(by_namespace, by_expression);
    let NamespaceSelector::Labels(selector) = &by_namespace.namespace else { panic!("{by_namespace:?}") };
    assert!(selector.keys().eq(["team"]) && by_namespace.service_account.as_deref() == Some("s"));

    let rule = |lines: &str| format!("[[exempt]]\nname = 'a'\n{lines}");
    let labels = "namespace_selector.match_labels = { a = 'b' }";
    let namespaces =
        |rest: &str| rule(&format!("namespace_selector.match_expressions = [{{ key = 'k', {rest} }}]"));
    let expression = |rest: &str| {
        rule(&format!("namespace = 'a'\npod_selector.match_expressions = [{{ key = 'k', {rest} }}]"))
    };
    for (text, position, part) in [
        (rule("namespace = 'A'"), "3:13", "exempt.namespace"),
        (rule("namespace = '*'"), "3:13", "exempt.namespace"),
        (rule("namespace = 'a'\nservice_account = ''"), "4:19", "exempt.service_account"),
        (rule("service_account = 's'"), "3:19", "need a namespace"),
        (rule("netns = '/n'\npod_selector.match_labels = { a = 'b' }"), "4:1", "need a namespace"),
        (rule("namespace = 'a'\nnetns = '/n'"), "2:8", "only one"),
        (rule("namespace = 'a'\npod_selector = {}"), "4:16", "remove the key"),
        (
            rule("namespace = 'a'\npod_selector = { match_labels = { a = 'b' }, labels = {} }"),
            "4:46",
            "labels",
        ),
        (rule("namespace = 'a'\npod_selector.match_labels = { 'a b' = 'c' }"), "4:31", "label key"),
        (rule("namespace = 'a'\npod_selector.match_labels = { a = 'b c' }"), "4:35", "label value"),
        (expression("operator = 'in', values = ['v']"), "4:59", "not one of In"),
        (expression("operator = 'In'"), "4:59", "require values"),
        (expression("operator = 'In', values = []"), "4:74", "an empty list"),
        (expression("operator = 'Exists', values = ['v']"), "4:78", "take no values"),
        ("[kubernetes]\nenabled = 'no'\n".to_owned() + &rule("namespace = 'a'"), "4:8", "kubernetes.enabled"),
        (rule(&format!("namespace = 'a'\n{labels}")), "2:8", "only one"),
        (rule(&format!("netns = '/n'\n{labels}")), "2:8", "only one"),
        (rule("namespace_selector = {}"), "3:22", "exempt.namespace_selector: is empty; set match_labels"),
        (
            rule("namespace_selector = { match_labels = { a = 'b' }, match_label = {} }"),
            "3:52",
            "did you mean \"match_labels\"?",
        ),
        (rule("namespace = 'a'\nnamespace_selectors = {}"), "4:1", "did you mean \"namespace_selector\"?"),
        (
            rule("namespace_selector.match_labels = { 'a b' = 'c' }"),
            "3:37",
            "exempt.namespace_selector: \"a b\"",
        ),
        (
            rule("namespace_selector.match_labels = { a = 'b c' }"),
            "3:41",
            "exempt.namespace_selector: \"b c\"",
        ),
        (namespaces("operator = 'in'"), "3:65", "exempt.namespace_selector.match_expressions.operator"),
        (namespaces("operator = 'NotIn'"), "3:65", "exempt.namespace_selector.match_expressions.values"),
        (
            namespaces("operator = 'Exists', values = ['v']"),
            "3:84",
            "exempt.namespace_selector.match_expressions.values: Exists",
        ),
        (
            namespaces("operator = 'In', values = []"),
            "3:80",
            "exempt.namespace_selector.match_expressions.values: an",
        ),
        (
            "[kubernetes]\nenabled = 'no'\n".to_owned() + &rule(labels),
            "4:8",
            "exempt.namespace_selector: needs the pod watch, but kubernetes.enabled",
        ),
        (format!("{}\n{}", rule(labels), rule(labels).replace("'a'\nn", "'b'\nn")), "5:8", "the same"),
        (
            format!("{}\n{}", rule("namespace = 'a'"), rule("namespace = 'a'").replace("'a'\nn", "'b'\nn")),
            "5:8",
            "the same",
        ),
    ] {
        let error = resolve(&text).unwrap_err();
        assert!(
            error.starts_with(&format!("imds.toml:{position}: ")) && error.contains(part),
            "{text}: {error}"
        );
    }
}

#[test]
fn aks_profile_covers_incompatible_add_ons() {
    const PROFILE: &str = include_str!("../../../../deploy/profiles/aks.toml");
    let rules = resolve(PROFILE).unwrap();
    for name in [
        "application-gateway-ingress-controller",
        "container-insights",
        "virtual-nodes",
        "azure-policy",
        "flux",
        "dapr",
        "app-configuration",
        "azure-machine-learning",
        "azure-container-storage",
        "azure-backup",
        "ai-toolchain-operator",
        "application-routing",
        "http-application-routing",
        "web-application-routing",
        "cost-analysis",
        "key-vault-secrets-provider",
    ] {
        assert!(rules.iter().any(|rule| rule.name == name), "{name}");
    }
    assert!(rules.iter().all(|rule| matches!(rule.sender, RuleSubject::Pods(_)) && !rule.is_audited));
    let token = "GET /metadata/identity/oauth2/token".to_owned();
    let scopes: Vec<_> = rules.iter().filter_map(|rule| rule.allow.as_ref()).collect();
    assert!(scopes.len() > 4 && scopes.iter().all(|scope| **scope == [token.clone()]), "{scopes:?}");
}

#[test]
fn scoped_rules_list_requests() {
    let rule = |lines: &str| format!("[[exempt]]\nname = 'a'\n{lines}");
    assert_eq!(one("netns = '/n'").allow, None);
    let azure =
        |lines: &str| resolve(&format!("provider = 'azure'\n{}", rule(lines))).unwrap().remove(0).allow;
    let listed = azure("netns = '/n'\nallow = ['GET /metadata/b', 'PUT /a']").unwrap();
    assert_eq!(listed, ["GET /metadata/b", "PUT /a"]);
    let expanded = azure("netns = '/n'\nallow = ['instance', 'GET /zone']").unwrap();
    assert!(expanded.len() > 1 && expanded.contains(&"GET /zone".to_owned()), "{expanded:?}");
    assert!(!expanded.contains(&"instance".to_owned()));
    for (lines, position, part) in [
        ("netns = '/n'\nallow = []", "4:9", "needs 1 to 32 entries"),
        ("netns = '/n'\nallow = ['instances']", "4:10", "did you mean \"instance\"?"),
        ("netns = '/n'\nallow = ['GET metadata']", "4:10", "does not start with /"),
        ("netns = '/n'\nallow = ['FETCH /metadata']", "4:10", "\"FETCH\""),
        ("netns = '/n'\nallow = ['GET /a', 'GET /a']", "4:20", "twice"),
        ("netns = '/n'\nallow = ['GET /a']\naudit = true", "4:9", "remove `audit = true`"),
        ("interface = 'v*'\nallow = ['GET /a']", "4:9", "by its interface"),
        ("netns = '/n'\nallow = 'GET /a'", "4:9", "expected"),
        (
            "netns = '/n'\nallow = ['GET /a']\n[[exempt]]\nname = 'b'\nnetns = '/n'",
            "6:8",
            "only one limits the requests",
        ),
    ] {
        let error = resolve(&rule(lines)).unwrap_err();
        assert!(
            error.starts_with(&format!("imds.toml:{position}: ")) && error.contains(part),
            "{lines}: {error}"
        );
    }
    let error = resolve(&format!(
        "provider = 'none'\n[[endpoint]]\nname = 'x'\naddress = '10.0.0.9'\n{}",
        rule("netns = '/n'\nallow = ['instance']")
    ));
    assert!(error.unwrap_err().contains("has no meaning for provider \"none\""));
}
