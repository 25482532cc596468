//! Differential test: servers that decode, normalise or lower-case a path never route an accepted request to a handler that no rule
//! allows.

use imds_broker::{allow::Rule, request::Request};
use proptest::{
    prelude::*,
    strategy::ValueTree as _,
    test_runner::{Config, TestRunner},
};

use crate::{
    ALLOW, LOCATION,
    harness::{Broker, status},
    simulator::Simulator,
};

/// Step in which a server changes a target before it routes the request.
type Step = fn(&str) -> String;

/// Servers: the simplest one, one for each step, and one with all steps.
const SERVERS: [&[Step]; 9] = [
    &[],
    &[percent_decode],
    &[percent_decode, percent_decode],
    &[normalise],
    &[percent_decode, normalise],
    &[drop_parameters, normalise],
    &[truncate_at_nul, normalise],
    &[to_ascii, lower_case],
    &[percent_decode, percent_decode, to_ascii, truncate_at_nul, drop_parameters, normalise, lower_case],
];

/// Returns the path of the handler that a server chooses.
fn route(server: &[Step], target: &str) -> String {
    let without_host = target.strip_prefix("http://").and_then(|rest| rest.find('/').map(|at| &rest[at..]));
    let target = without_host.unwrap_or(target);
    let path = target.split(['?', '#']).next().unwrap_or_default();
    server.iter().fold(path.to_owned(), |path, step| step(&path))
}

fn percent_decode(path: &str) -> String {
    let (mut decoded, mut rest) = (Vec::new(), path.as_bytes());
    while let Some((&byte, after)) = rest.split_first() {
        let digits =
            after.get(..2).and_then(|digits| u8::from_str_radix(str::from_utf8(digits).ok()?, 16).ok());
        rest = after;
        match digits {
            Some(value) if byte == b'%' => {
                decoded.push(value);
                rest = &after[2..];
            }
            _ => decoded.push(byte),
        }
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

fn normalise(path: &str) -> String {
    let mut segments = Vec::new();
    for segment in path.replace('\\', "/").split('/') {
        match segment {
            "" | "." => {}
            ".." => drop(segments.pop()),
            _ => segments.push(segment.to_owned()),
        }
    }
    format!("/{}", segments.join("/"))
}

fn drop_parameters(path: &str) -> String {
    let segments: Vec<_> =
        path.split('/').map(|segment| segment.split(';').next().unwrap_or_default()).collect();
    segments.join("/")
}

fn truncate_at_nul(path: &str) -> String {
    path.split('\0').next().unwrap_or_default().to_owned()
}

/// Replaces fullwidth forms and other slashes.
fn to_ascii(path: &str) -> String {
    let replace = |c: char| match c {
        '\u{ff01}'..='\u{ff5e}' => char::from_u32(u32::from(c) - 0xfee0).unwrap_or(c),
        '\u{2044}' | '\u{2215}' | '\u{29f8}' => '/',
        '\u{2024}' => '.',
        _ => c,
    };
    path.chars().map(replace).collect()
}

fn lower_case(path: &str) -> String {
    path.to_lowercase()
}

/// Generates targets from parts that servers treat specially.
fn target() -> impl Strategy<Value = String> {
    let part = prop_oneof![
        4 => prop::sample::select(vec![
            LOCATION,
            "/metadata/instance/compute",
            "/metadata/instance/compute/userData",
            "/metadata/identity/oauth2/token",
            "/location",
            "/token",
            "/metadata",
            "x",
        ]).prop_map(str::to_owned),
        4 => prop::sample::select(vec![
            "/", "//", "/.", "/..", "/../", "/.;/", "/..;/", "/%2e%2e/", "/%2E.", "/.%2e/", "%2f", "%2F", "%5c", "%252e%252e%252f",
            "%00", "%0d%0a", "%", "%c0%ae", "\\", "/..\\", ";a=b", "/;/", "\0", "\u{ff0e}\u{ff0e}\u{ff0f}", "\u{2215}", "\u{2024}",
            "http://169.254.169.254", "@169.254.169.254", ":80",
        ]).prop_map(str::to_owned),
        2 => prop::sample::select(vec![
            "?", "#", "?api-version=1", "&format=text", "?a=/../../identity/oauth2/token", "&api-version=1", "?comp=x", " ", "\t",
        ]).prop_map(str::to_owned),
        1 => "[ -~]{1,3}",
    ];
    (prop::collection::vec(part, 1..5), any::<bool>(), 0..60_usize).prop_map(|(parts, is_absolute, upper)| {
        let mut target = if is_absolute { LOCATION.to_owned() } else { String::new() } + &parts.concat();
        if let Some(letter) = target.get_mut(upper..=upper) {
            // Changes the case of one letter of some targets.
            letter.make_ascii_uppercase();
        }
        target
    })
}

/// Reports whether a rule allows the handler, however the server writes its path.
fn is_allowed_handler(handler: &str) -> bool {
    let (handler, location) = (handler.to_lowercase(), LOCATION.to_lowercase());
    handler.strip_prefix(&location).is_some_and(|below| below.is_empty() || below.starts_with('/'))
}

fn assert_routes_are_allowed(target: &str) {
    for (number, server) in SERVERS.iter().enumerate() {
        let handler = route(server, target);
        assert!(is_allowed_handler(&handler), "server {number} routes {target:?} to {handler}");
    }
}

#[test]
fn simulators_can_be_deceived() {
    for (target, handler) in [
        ("/a/../b?c", "/b"),
        ("/a/%252e%252e/B", "/b"),
        ("/a\\..\\b", "/b"),
        ("/a/..;x/b", "/b"),
        ("/a/\u{ff0e}\u{ff0e}/b", "/b"),
        ("http://x/a/./b%00c", "/a/b"),
    ] {
        assert_eq!(route(SERVERS[8], target), handler, "{target:?}");
    }
}

proptest! {
    #![proptest_config(Config { cases: 20_000, failure_persistence: None, ..Config::default() })]
    #[test]
    fn accepted_targets_have_one_route(target in target()) {
        let rules = ALLOW.map(|rule| Rule::parse(rule).unwrap());
        let head = format!("GET {target} HTTP/1.1\r\nHost: a\r\n\r\n");
        if let Ok(request) = Request::parse(head.as_bytes())
            && rules.iter().any(|rule| rule.allows(request.method().as_str(), request.path(), request.query()))
        {
            assert_routes_are_allowed(request.target());
        }
    }
}

#[test]
fn generated_requests_keep_their_route() {
    let broker = Broker::start();
    let service = Simulator::start_echo(&broker.node);
    let pods: Vec<_> = (0..4).map(|_| broker.pod("azure", &ALLOW)).collect();
    let mut runner = TestRunner::new(Config { failure_persistence: None, ..Config::default() });
    let mut statuses = std::collections::BTreeMap::new();
    for pod in pods.iter().cycle().take(800) {
        let target = target().new_tree(&mut runner).unwrap().current();
        *statuses.entry(status(&pod.get(&target))).or_insert(0) += 1;
    }
    println!("{statuses:?}");
    assert!([200, 400, 403].iter().all(|status| statuses.contains_key(status)), "{statuses:?}");
    for seen in service.seen() {
        assert_routes_are_allowed(&seen.target);
    }
}
