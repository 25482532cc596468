//! Narrowest list `allow` for the requests that a sender made.

use std::collections::BTreeMap;

use imds_broker::allow::{INSTANCE, Rule, instance_rules};

use crate::datapath::maps::request_log::PATH_LEN;

/// Fewest segments of a path that replaces several: `/latest/meta-data`.
const MIN_SEGMENTS: usize = 2;

/// Requests for the list `allow` of a rule.
#[derive(Clone, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
pub(super) struct ProposedRequests {
    /// Requests in the provider's list of harmless ones, or the keyword for this list.
    harmless: Vec<String>,
    /// Other requests that the sender makes today. They may return credentials, user data or keys.
    needed: Vec<String>,
    /// Other requests that the broker refused. Each is only a comment of the proposed rule.
    refused: Vec<String>,
    /// True if the sender makes requests today that no list can contain.
    pub(super) needs_all: bool,
    /// True if the sender is exempt by a rule of the configuration.
    pub(super) is_exempt: bool,
}

/// Request that a sender made.
#[derive(Clone, Copy, Debug)]
pub(super) struct SeenRequest<'r> {
    pub(super) method: &'r str,
    pub(super) path: &'r str,
    pub(super) passage: Passage,
}

/// Reason why a request reached the endpoint, or did not.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Passage {
    /// The sender is exempt or audited: all its requests pass.
    Unrestricted,
    /// The list of the sender's rule allows the request.
    Listed,
    /// The broker did not allow the request.
    Refused,
}

impl ProposedRequests {
    /// Returns the list for the requests of a sender. Leaves out requests that no rule can allow.
    pub(super) fn new<'r>(requests: impl IntoIterator<Item = SeenRequest<'r>>, provider: &str) -> Self {
        let listed = instance_rules(provider).unwrap_or_default();
        let instance: Vec<_> = listed.iter().filter_map(|rule| Rule::parse(rule).ok()).collect();
        let is_harmless =
            |method: &str, path: &str| instance.iter().any(|rule| rule.allows(method, path, None));
        let (mut harmless, mut needed, mut refused) = (Paths::default(), Paths::default(), Paths::default());
        let mut needs_all = false;
        for SeenRequest { method, path, passage } in requests {
            let text = format!("{method} {path}");
            // A path of the largest length may be truncated.
            if path.len() >= PATH_LEN || Rule::parse(&text).is_err() {
                needs_all |= passage == Passage::Unrestricted;
                continue;
            }
            let paths = match passage {
                _ if is_harmless(method, path) => &mut harmless,
                Passage::Unrestricted | Passage::Listed => &mut needed,
                Passage::Refused => &mut refused,
            };
            paths.add(method, path);
        }
        // A directory with both harmless and other documents replaces nothing, because it covers too much.
        let is_mixed = |method: &str, path: &str| {
            let directory = format!("{method} {path}/");
            listed.iter().any(|rule| rule.starts_with(&directory))
        };
        let [needed, mut refused] =
            [needed, refused].map(|paths| paths.rules(|method, path| !is_mixed(method, path)));
        refused.retain(|request| !needed.contains(request));
        let are_all_harmless = needed.is_empty() && refused.is_empty() && !harmless.0.is_empty();
        let harmless = if are_all_harmless { vec![INSTANCE.to_owned()] } else { harmless.rules(is_harmless) };
        Self { harmless, needed, refused, needs_all, is_exempt: false }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.allow().next().is_none() && self.refused.is_empty()
    }

    /// Returns the entries of the list.
    pub(super) fn allow(&self) -> impl Iterator<Item = &String> {
        self.harmless.iter().chain(&self.needed)
    }

    /// Returns a comment for each request that the operator has to decide on.
    pub(super) fn cautions(&self) -> impl Iterator<Item = String> {
        let needed =
            self.needed.iter().map(|request| format!("may grant credentials or identity: {request}"));
        let refused = self
            .refused
            .iter()
            .map(|request| format!("left out, because it may grant credentials or identity: {request}"));
        needed.chain(refused)
    }
}

/// Paths by method.
#[derive(Debug, Default)]
struct Paths<'r>(BTreeMap<&'r str, Node>);

/// Segment of paths.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
struct Node {
    /// True if a path ends here.
    ends: bool,
    below: BTreeMap<String, Node>,
}

impl<'r> Paths<'r> {
    fn add(&mut self, method: &'r str, path: &str) {
        let mut node = self.0.entry(method).or_default();
        for segment in path.split('/').filter(|segment| !segment.is_empty()) {
            node = node.below.entry(segment.to_owned()).or_default();
        }
        node.ends = true;
    }

    /// Returns the rules that allow the paths. `may_allow` reports whether a rule may replace those for paths below it.
    fn rules(mut self, may_allow: impl Fn(&str, &str) -> bool) -> Vec<String> {
        let mut rules = Vec::new();
        for (method, node) in &mut self.0 {
            node.shorten("", 0, &|path| may_allow(method, path));
            node.collect("", &mut |path| rules.push(format!("{method} {path}")));
        }
        rules
    }
}

impl Node {
    /// Replaces paths that differ only in an identifier, such as the MAC addresses of an instance, by the path above it.
    fn shorten(&mut self, path: &str, depth: usize, may_allow: &dyn Fn(&str) -> bool) {
        for (segment, node) in &mut self.below {
            node.shorten(&format!("{path}/{segment}"), depth + 1, may_allow);
        }
        if depth >= MIN_SEGMENTS && !self.ends && self.has_equal_identifiers() && may_allow(path) {
            *self = Self { ends: true, below: BTreeMap::new() };
        }
    }

    /// Reports whether several identifiers with equal paths below them follow. An identifier has a digit, unlike most words.
    fn has_equal_identifiers(&self) -> bool {
        let mut nodes = self.below.values();
        let first = nodes.next();
        let are_equal = nodes.len() > 0 && nodes.all(|node| Some(node) == first);
        let has_digit = |segment: &String| segment.contains(|char: char| char.is_ascii_digit());
        are_equal && first.is_some_and(|node| !node.below.is_empty()) && self.below.keys().all(has_digit)
    }

    fn collect(&self, path: &str, add: &mut dyn FnMut(&str)) {
        if self.ends {
            add(path);
        }
        for (segment, node) in &self.below {
            node.collect(&format!("{path}/{segment}"), add);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Passage::*, *};

    fn seen(request: &str, passage: Passage) -> SeenRequest<'_> {
        let (method, path) = request.split_once(' ').unwrap();
        SeenRequest { method, path, passage }
    }

    /// Returns the harmless and the refused requests of a scoped pod.
    fn proposed(provider: &str, requests: &[&str]) -> (Vec<String>, Vec<String>) {
        let requests = requests.iter().map(|request| seen(request, Refused));
        let ProposedRequests { harmless, refused, needed, needs_all, .. } =
            ProposedRequests::new(requests, provider);
        assert!(needed.is_empty() && !needs_all);
        (harmless, refused)
    }

    fn texts(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|&text| text.to_owned()).collect()
    }

    #[test]
    fn harmless_requests_are_the_keyword() {
        let requests = ["PUT /latest/api/token", "GET /latest/meta-data/placement/region"];
        assert_eq!(proposed("aws", &requests), (texts(&["instance"]), Vec::new()));
        assert_eq!(proposed("aws", &[]), (Vec::new(), Vec::new()));
    }

    #[test]
    fn other_requests_are_not_allowed() {
        let requests = [
            "GET /latest/meta-data/placement/region/",
            "GET /latest/meta-data/iam/security-credentials/role",
            "GET /latest/user-data",
        ];
        let expected = (
            texts(&["GET /latest/meta-data/placement/region"]),
            texts(&["GET /latest/meta-data/iam/security-credentials/role", "GET /latest/user-data"]),
        );
        assert_eq!(proposed("aws", &requests), expected);
        // Without a list of the provider, no request is known to be harmless.
        assert_eq!(proposed("generic", &["GET /a"]), (Vec::new(), texts(&["GET /a"])));
        // A document that contains credentials covers no harmless path.
        let (allow, others) = proposed("aws", &["GET /latest/meta-data/", "GET /latest/meta-data/ami-id"]);
        assert_eq!(
            (allow, others),
            (texts(&["GET /latest/meta-data/ami-id"]), texts(&["GET /latest/meta-data"]))
        );
    }

    #[test]
    fn requests_that_no_rule_can_allow_are_left_out() {
        let long = format!("GET /{}", "a".repeat(PATH_LEN - 1));
        for request in ["BREW /a", "GET /a/../b", "GET /a%20b", "GET /", "GET a", "GET /a\\n", &long] {
            assert!(ProposedRequests::new([seen(request, Refused)], "aws").is_empty(), "{request}");
        }
    }

    #[test]
    fn requests_that_pass_stay_allowed() {
        let role = "GET /latest/meta-data/iam/security-credentials/role";
        let requests = [
            seen("GET /latest/meta-data/placement/region", Unrestricted),
            seen(role, Unrestricted),
            seen(role, Refused),
            seen("GET /latest/user-data", Refused),
        ];
        let proposed = ProposedRequests::new(requests, "aws");
        let allow: Vec<_> = proposed.allow().map(String::as_str).collect();
        assert_eq!(allow, ["GET /latest/meta-data/placement/region", role]);
        let cautions: Vec<_> = proposed.cautions().collect();
        assert_eq!(
            cautions,
            [
                &format!("may grant credentials or identity: {role}"),
                "left out, because it may grant credentials or identity: GET /latest/user-data",
            ]
        );
        assert!(!proposed.needs_all);
        let proposed = ProposedRequests::new([seen(role, Listed)], "aws");
        assert_eq!(proposed.allow().collect::<Vec<_>>(), [role]);
        assert_eq!(proposed.cautions().count(), 1);
        // A part of a longer path, which no list can contain.
        let truncated = "GET /latest/meta-da*";
        assert!(
            ProposedRequests::new([seen(role, Unrestricted), seen(truncated, Unrestricted)], "aws").needs_all
        );
        for passage in [Listed, Refused] {
            assert!(
                !ProposedRequests::new([seen(role, Unrestricted), seen(truncated, passage)], "aws").needs_all
            );
        }
    }

    #[test]
    fn only_identifiers_with_equal_paths_are_shortened() {
        let macs = "/latest/meta-data/network/interfaces/macs";
        let below = |mac: &str, leaf: &str| format!("GET {macs}/{mac}/{leaf}");
        let requests = [
            below("0e:49:61:0f:c3:11", "subnet-id"),
            below("0e:49:61:0f:c3:11", "vpc-id"),
            below("0e:49:61:0f:c3:12", "subnet-id"),
            below("0e:49:61:0f:c3:12", "vpc-id"),
        ];
        let all: Vec<_> = requests.iter().map(String::as_str).collect();
        assert_eq!(proposed("aws", &all).1, [format!("GET {macs}")]);
        assert_eq!(proposed("aws", &all[..3]).1, texts(&all[..3]));
        // Words are no identifiers, and a shorter path must not allow more than the provider's list.
        let words =
            ["GET /latest/meta-data/placement/region", "GET /latest/meta-data/services/region", "GET /x"];
        assert_eq!(proposed("aws", &words).0, texts(&words[..2]));
        let versions = ["GET /2009-04-04/meta-data/a", "GET /2021-03-23/meta-data/a"];
        assert_eq!(proposed("aws", &versions).1, texts(&versions));
        let tags = [
            "GET /latest/meta-data/tags/instance/a1/x",
            "GET /latest/meta-data/tags/instance/a2/x",
            "GET /latest/user-data",
        ];
        assert_eq!(proposed("aws", &tags).0, ["GET /latest/meta-data/tags/instance"]);
        let outside = ["GET /latest/meta-data/1/x", "GET /latest/meta-data/2/x"];
        assert_eq!(proposed("aws", &outside).1, texts(&outside));
    }
}
