use std::path::Path;

use imds_ebpf_common::{Address, Hook};

use super::*;
use crate::{
    config::{Config, PodSelector, RuleSubject as Rule, provider::Dmi},
    datapath::maps::request_log::{RequestCount, RequestKey},
    encode::text_field,
    telemetry::{http_request::RequestOutcome, request_report::tests::entry},
};

fn record(namespace: &str, account: &str, label: &str) -> DenialRecord {
    DenialRecord {
        count: 2,
        bytes: 148,
        first: 1_000_000_000,
        last: 2_000_000_000,
        namespace: text_field(namespace),
        service_account: text_field(account),
        label: text_field(label),
        pod: text_field(if namespace.is_empty() { "" } else { "pod-0" }),
        interface: text_field("tap0"),
        comm: text_field(""),
        cgroup: text_field(""),
    }
}

fn key(hook: Hook, verdict: Verdict) -> DenialKey {
    let address = Address::from_ipv4([169, 254, 169, 254]);
    DenialKey { address, sender: 7, hook: hook as u32, verdict: verdict as u32 }
}

fn report(records: &[(DenialKey, DenialRecord)]) -> DenialReport {
    let protected = Config::default().resolve(&Dmi::default()).unwrap().0;
    DenialReport::new("/pins".into(), records, &protected.endpoints, &["tap0".to_owned()].into())
}

/// Parses the rules of the report.
fn proposed_rules(report: &DenialReport) -> Vec<Rule> {
    let config =
        Config::parse(&report.rules, Path::new("imds.toml")).unwrap_or_else(|error| panic!("{error}"));
    let rules = config.resolve(&Dmi::default()).unwrap().1;
    rules.into_iter().map(|rule| rule.sender).collect()
}

#[test]
fn hooks_of_one_sender_are_merged() {
    let later = DenialRecord { last: 3_000_000_000, pod: text_field("pod-1"), ..record("a", "s", "app=x") };
    let report = report(&[
        (key(Hook::Socket, Verdict::Audited), record("a", "s", "app=x")),
        (key(Hook::FromPod, Verdict::Audited), later),
    ]);
    let [denial] = &report.denials[..] else { panic!("{report:?}") };
    assert_eq!(denial.counts, [("from_pod", 2), ("socket", 2)].into());
    assert_eq!(denial.bytes, 2 * 148);
    assert_eq!(
        (denial.pod.as_deref(), denial.verdict, denial.endpoint.as_deref()),
        (Some("pod-1"), "audited", Some("imds"))
    );
    let [Rule::Pods(PodSelector { namespace, service_account, selector: Some(selector) })] =
        &proposed_rules(&report)[..]
    else {
        panic!("{}", report.rules)
    };
    assert_eq!((namespace.to_string(), service_account.as_deref()), ("namespace a".to_owned(), Some("s")));
    assert!(selector.matches(|key| (key == "app").then_some("x")));
    let table = report.table();
    assert!(
        table.contains("a/s app=x") && table.contains("FROM_POD") && table.contains("1970-01-01T00:00:03Z"),
        "{table}"
    );
}

#[test]
fn senders_get_distinct_rules() {
    let call = DenialRecord { comm: text_field("cu\"rl"), interface: text_field(""), ..record("", "", "") };
    let report = report(&[
        (key(Hook::FromPod, Verdict::Denied), record("a", "default", "")),
        (key(Hook::FromPod, Verdict::Denied), record("a", "default", "app.kubernetes.io/name=x")),
        (key(Hook::FromPod, Verdict::Denied), record("", "", "")),
        (
            key(Hook::FromPod, Verdict::Denied),
            DenialRecord { interface: text_field("#9"), ..record("", "", "") },
        ),
        (key(Hook::Socket, Verdict::Denied), call),
        (key(Hook::Socket, Verdict::Denied), DenialRecord { cgroup: text_field("a/b\"c"), ..call }),
        (
            key(Hook::Socket, Verdict::Denied),
            DenialRecord { cgroup: text_field("kubelet.slice/kubelet-kubepods.slice/pod7"), ..call },
        ),
        (
            key(Hook::Socket, Verdict::Denied),
            DenialRecord { comm: text_field("wget"), cgroup: text_field("a/b\"c"), ..call },
        ),
    ]);
    assert_eq!(report.denials.len(), 8);
    let proposed_rules = proposed_rules(&report);
    assert_eq!(proposed_rules.len(), 4, "{}", report.rules);
    assert!(proposed_rules.contains(&Rule::Cgroup("a/b\"c".into())), "{proposed_rules:?}");
    assert_eq!(report.rules.matches("# This rule exempts").count(), 2);
}

#[test]
fn unprotected_address_gets_no_rule() {
    let gone =
        DenialKey { address: Address::from_ipv4([10, 0, 0, 9]), ..key(Hook::FromPod, Verdict::Denied) };
    let report = report(&[(gone, record("a", "s", ""))]);
    assert!(report.rules.is_empty() && report.table().contains("10.0.0.9"));
    assert!(DenialReport::new("/pins".into(), &[], &[], &BTreeSet::new()).table().starts_with("no denials"));
}

fn with_requests(
    denials: &[(DenialKey, DenialRecord)],
    requests: &[(RequestKey, RequestCount)],
) -> DenialReport {
    let protected = Config::default().resolve(&Dmi::default()).unwrap().0;
    let requests = ReportedRequest::from_counts(requests, &protected.endpoints);
    report(denials).with_requests(requests, Some("aws"), &BTreeSet::new())
}

#[test]
fn known_requests_get_a_list_instead_of_an_exemption() {
    let denied = (key(Hook::Socket, Verdict::Denied), record("a", "web", ""));
    let requests = [
        entry("a", "PUT", "/latest/api/token", RequestOutcome::Allowed),
        entry("a", "GET", "/latest/meta-data/ami-id", RequestOutcome::Refused),
    ];
    let report = with_requests(&[denied], &requests);
    let expected = "[[exempt]]\nname = \"a-web\"\nnamespace = \"a\"\nservice_account = \"web\"\n\
                    endpoints = [\"imds\"]\nallow = [\"instance\"]\n\n";
    assert_eq!(report.rules, expected);
    let user_data = entry("a", "GET", "/latest/user-data", RequestOutcome::Refused);
    let report = with_requests(&[denied], &[&requests[..], &[user_data]].concat());
    let expected = "# left out, because it may grant credentials or identity: GET /latest/user-data\n\
                    [[exempt]]\nname = \"a-web\"\nnamespace = \"a\"\nservice_account = \"web\"\n\
                    endpoints = [\"imds\"]\n\
                    allow = [\"GET /latest/meta-data/ami-id\", \"PUT /latest/api/token\"]\n\n";
    assert_eq!(report.rules, expected);
    proposed_rules(&report);
    let table = report.table();
    assert!(
        table.contains("SOCKET") && table.contains("REQUEST") && table.ends_with(&report.rules),
        "{table}"
    );
}

#[test]
fn requests_that_pass_get_a_list_or_an_exemption() {
    let audited = (key(Hook::FromPod, Verdict::Audited), record("a", "web", ""));
    let role = entry("a", "GET", "/latest/meta-data/iam/security-credentials/r", RequestOutcome::Audited);
    let report = with_requests(&[audited], &[role]);
    let expected = "# may grant credentials or identity: GET /latest/meta-data/iam/security-credentials/r\n\
                    [[exempt]]\nname = \"a-web\"\nnamespace = \"a\"\nservice_account = \"web\"\n\
                    endpoints = [\"imds\"]\n\
                    allow = [\"GET /latest/meta-data/iam/security-credentials/r\"]\n\n";
    assert_eq!(report.rules, expected);
    let encoded = entry("a", "GET", "/latest/%6deta-data", RequestOutcome::Audited);
    let report = with_requests(&[audited], &[role, encoded]);
    assert!(!report.rules.contains("allow") && report.rules.contains("name = \"a-web\""), "{}", report.rules);
}

#[test]
fn exempt_senders_get_a_comment() {
    let request = entry("a", "GET", "/latest/meta-data/ami-id", RequestOutcome::Exempt);
    let report = with_requests(&[], &[request]);
    let expected = "# Exempt from all denials today. To limit it to its requests, replace its rule by:\n\
                    # [[exempt]]\n# name = \"a-web\"\n# namespace = \"a\"\n# service_account = \"web\"\n\
                    # endpoints = [\"imds\"]\n# allow = [\"instance\"]\n\n";
    assert_eq!(report.rules, expected);
    let malformed = entry("a", "GET", "/a%20b", RequestOutcome::Exempt);
    assert_eq!(with_requests(&[], &[request, malformed]).rules, "");
}

#[test]
fn credentials_get_no_rule() {
    let user_data = entry("a", "GET", "/latest/user-data", RequestOutcome::Refused);
    let unknown = entry("", "GET", "/latest/meta-data/ami-id", RequestOutcome::Refused);
    let malformed = entry("b", "GET", "/a/../b", RequestOutcome::Refused);
    let report = with_requests(&[], &[user_data, unknown, malformed]);
    let expected = "# No rule for a/web at imds, because it makes no request that is known to be harmless:\n\
                    # left out, because it may grant credentials or identity: GET /latest/user-data\n\n";
    assert_eq!(report.rules, expected);
    assert!(proposed_rules(&report).is_empty());
    assert!(report.table().contains("/a/../b"));
}
