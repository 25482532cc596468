//! Errors: their position, their number and their suggestions.

use super::*;

#[test]
fn errors_name_file_line_and_key() {
    for (text, expected) in [
        (
            "mode = 'audit'\n\n[interfaces]\n  inlcude = []",
            "4:3: interfaces.inlcude: unknown field `inlcude`",
        ),
        ("mode = 'of'", "1:8: mode: unknown variant `of`"),
        ("on_deny = 1", "1:11: on_deny: "),
        ("[interfaces]\nexclude = ['veth[']", "2:12: interfaces.exclude: "),
        ("[interfaces]\ninclude = ['a*', 'b']\nexclude = ['b']", "3:12: interfaces.exclude: \"b\""),
        ("[interfaces]\ninclude = ['a', 7]", "2:17: interfaces.include: "),
        ("\n[hooks]\nfrom_pod = 'yes'", "3:12: hooks.from_pod: "),
        ("hooks = 3", "1:9: hooks: "),
        ("[node]\nallow = 'uid:0'", "2:9: node.allow: "),
        ("[node]\nallow = ['uid:0', 7]", "2:19: node.allow: "),
        ("[node]\nallow = ['uid:0', 'uid:root']", "2:19: node.allow: \"uid:root\": a user is a number"),
        ("[node]\nallow = ['uid:0', 'uid:0']", "2:19: node.allow: \"uid:0\" is listed twice"),
        ("[node]\nallow = ['cgroup:/']", "2:10: node.allow: \"cgroup:/\": the root covers every process"),
        ("\n[hooks]\nsendmsg = 'yes'", "3:11: hooks.sendmsg: "),
        ("\n[hooks]\nsendmsg = 1", "3:11: hooks.sendmsg: "),
        ("\n[hooks]\nsocket = false\nsendmsg = true", "4:11: hooks.sendmsg: true needs hooks.socket"),
        ("\n[hooks]\nfrom_pod = false\nsocket = false\nnode_egress = false", "2:1: hooks: all hooks are off"),
        (
            "\n[[endpoint]]\nname = 'a'\n[[endpoint]]\naddress = '10.0.0.1'",
            "2:1: endpoint: missing field `address`",
        ),
    ] {
        let error = parse(text).unwrap_err();
        assert!(error.starts_with(&format!("imds.toml:{expected}")), "{text}: {error}");
    }
}

#[test]
fn errors_have_suggestions() {
    for (text, expected) in [
        ("modee = 'off'", "; did you mean \"mode\"?"),
        ("[node]\nalow = ['uid:0']", "; did you mean \"allow\"?"),
        ("[node]\nallow = ['0']", "; did you mean \"uid:0\"?"),
        ("[node]\nallow = ['cgoup:/system.slice']", "; did you mean \"cgroup\"?"),
        ("[hooks]\nhostnetwork = true", "; did you mean \"host_network\"?"),
        ("[[endpoint]]\nname = 'a'\nadress = '10.0.0.1'", "; did you mean \"address\"?"),
        ("provider = 'azur'", "; did you mean \"azure\"?"),
        ("provider = 'azure'\n[preset.wireservr]\nallow_ports = []", "; did you mean \"wireserver\"?"),
        (
            "[[endpoint]]\nname = 'a'\naddress = '10.0.0.0/24'",
            "not an IPv4 or IPv6 address: ranges are not supported: list the address",
        ),
        (
            "[[endpoint]]\nname = 'a'\naddress = 'fd00:ec2::/32'",
            "not an IPv4 or IPv6 address: ranges are not supported: list the address",
        ),
    ] {
        let errors = all_errors(text);
        assert!(errors.iter().any(|error| error.ends_with(expected)), "{text}: {errors:?}");
    }
    assert!(!all_errors("[[endpoint]]\nname = 'a'\naddress = '10.0.0.x/24'")[0].contains("ranges"));
    assert!(!all_errors("cluster = 1")[0].contains("did you mean"));
}

#[test]
fn all_errors_are_reported_together() {
    let text = "mode = 'of'\nmodus = 'off'\nprovider = 'gpc'\nextra_endpoints = ['ecs', 'eks']\n[hooks]\nsocket = 0\n\
                [interfaces]\ninclude = ['[', 'a', 3]\nexclude = ['a']\n\
                [[endpoint]]\nname = 'a'\naddress = '10.0.0'\nallow_ports = ['sctp/1']\n\
                [[endpoint]]\nname = 'b b'\naddress = '10.0.0.1'\n[[endpoint]]\nname = 'c'";
    let errors = all_errors(text);
    let lines: Vec<_> = errors.iter().map(|error| error.split(':').nth(1).unwrap()).collect();
    assert_eq!(lines, ["1", "2", "3", "4", "6", "8", "8", "9", "12", "13", "15", "17"], "{errors:#?}");
    let shown = Config::parse(text, Path::new("f")).unwrap_err().to_string();
    assert!(shown.starts_with("f:1:") && shown.contains("11 more"), "{shown}");

    let errors = all_errors("mode = \non_deny = ]\n[hooks");
    assert!(errors.len() >= 3, "{errors:#?}");
    let twice = "[[endpoint]]\nname = 'a'\naddress = '169.254.169.254'\n[[endpoint]]\nname = 'imds'\naddress = '1.2.3.4'";
    assert_eq!(all_errors(twice).len(), 2);
    assert!(all_errors(&"x = [".repeat(1000)).len() <= 50);
    let many = (0..1000).map(|n| format!("key{n} = {n}\n")).collect::<Vec<_>>().concat();
    assert_eq!(all_errors(&many).len(), 50);
}

#[test]
fn every_bad_item_of_a_list_is_reported() {
    let positions = |text: &str| {
        let errors = all_errors(text);
        let position = |error: &String| error.splitn(4, ':').skip(1).take(2).collect::<Vec<_>>().join(":");
        (errors.iter().map(position).collect::<Vec<_>>().join(" "), errors.join("\n"))
    };
    let rule = |lines: &str| format!("[[exempt]]\nname = 'a'\n{lines}");
    for (text, expected, parts) in [
        (
            "[[endpoint]]\nname = 'a b'\naddress = '10.0.0'\nallow_ports = ['53', 'udp/53', 'tcp/0', 'udp/53']".to_owned(),
            "2:8 3:11 4:16 4:32 4:41",
            &["endpoint.allow_ports: \"53\"", "\"tcp/0\"", "udp/53 is listed twice"][..],
        ),
        (
            "[preset.imds]\nallow_ports = ['x', 'y']".to_owned(),
            "2:16 2:21",
            &["preset.imds.allow_ports: \"x\"", "preset.imds.allow_ports: \"y\""],
        ),
        ("[node]\nallow = ['x', 'uid:0', 'y']".to_owned(), "2:10 2:24", &["node.allow: \"x\""]),
        ("extra_endpoints = ['x', 'y']".to_owned(), "1:20 1:25", &["extra_endpoints: \"y\""]),
        ("[metrics]\nlisten = ['x', 'y']".to_owned(), "2:11 2:16", &["metrics.listen: \"y\""]),
        ("[interfaces]\nexclude = ['[', '{']".to_owned(), "2:12 2:17", &["interfaces.exclude: "]),
        (
            "[kubernetes]\nkubeconfig = 'k'\nnode_name = 'A b'".to_owned(),
            "2:14 3:13",
            &["kubernetes.kubeconfig", "kubernetes.node_name"],
        ),
        (
            rule("netns = 'n'\nendpoints = ['a', 'a', 'b', 'b']"),
            "3:9 4:19 4:29",
            &["exempt.netns", "exempt.endpoints: \"b\" is listed twice"],
        ),
        (
            rule("namespace = 'A'\nservice_account = 'B'\npod_selector.match_labels = { 'a b' = 'c d' }"),
            "3:13 4:19 5:31 5:39",
            &["exempt.namespace: \"A\"", "exempt.service_account: \"B\"", "label value"],
        ),
        (
            rule(
                "namespace = 'a'\npod_selector.match_expressions = [\n{ key = 'a b', operator = 'In', values = ['c d', '/'] },\n\
                 { key = 'k', operator = 'in' }]",
            ),
            "5:9 5:43 5:50 6:25",
            &["label key", "\"/\" is not a valid label value", "\"in\" is not one of In"],
        ),
    ] {
        let (found, errors) = positions(&text);
        assert_eq!(found, expected, "{text}: {errors}");
        for part in parts {
            assert!(errors.contains(part), "{part:?} is not in: {errors}");
        }
    }
    // One error covers the ports beyond the maximum.
    let ports = (0..1000).map(|_| "'x', ").collect::<String>();
    assert_eq!(all_errors(&format!("[preset.imds]\nallow_ports = [{ports}]")).len(), 9);
}

#[test]
fn empty_lists_that_match_nothing_are_errors() {
    let rule = |lines: &str| format!("[[exempt]]\nname = 'a'\nnamespace = 'a'\n{lines}");
    for (text, expected) in [
        (rule("endpoints = []"), "exempts the pods from nothing; remove the key to cover all endpoints"),
        (rule("pod_selector = { match_labels = {} }"), "remove the key to match every pod"),
        (
            rule("pod_selector.match_expressions = [{ key = 'k', operator = 'NotIn', values = [] }]"),
            "or use the operator Exists or DoesNotExist without values",
        ),
        ("[interfaces]\ninclude = ['']".to_owned(), "interfaces.include: \"\" matches no interface"),
        ("[node]\nallow = 'uid:0'".to_owned(), "expected a list"),
    ] {
        let errors = all_errors(&text);
        assert!(errors.len() == 1 && errors[0].contains(expected), "{text}: {errors:?}");
    }
    for allowed in [
        "extra_endpoints = []",
        "[interfaces]\ninclude = []\nexclude = []",
        "[preset.imds]\nallow_ports = []",
    ] {
        assert!(parse(allowed).is_ok(), "{allowed}");
    }
}

/// The checks for duplicates compare all entries with each other.
#[test]
fn oversized_file_fails_before_other_checks() {
    let error = parse(&"[[exempt]]\nname = 'n'\ncgroup = 'x'\n".repeat(25_000)).unwrap_err();
    assert!(error.ends_with("exceeds 65536 bytes"), "{error}");
}
