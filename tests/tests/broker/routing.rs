//! Differential test: servers that decode, normalise or lower-case a path never route an accepted request to a handler that no rule
//! allows.

use imds_broker::{allow::Rule, request::Request};
use imds_tests::routing::{PATHS, QUERIES, SEPARATORS, SERVERS, assert_routes_are_allowed, route};
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

/// Generates targets from parts that servers treat specially.
fn target() -> impl Strategy<Value = String> {
    let part = prop_oneof![
        4 => prop::sample::select(&PATHS[..]).prop_map(str::to_owned),
        4 => prop::sample::select(&SEPARATORS[..]).prop_map(str::to_owned),
        2 => prop::sample::select(&QUERIES[..]).prop_map(str::to_owned),
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
