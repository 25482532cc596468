//! Rules that the report proposes, in the syntax of the configuration file.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    iter,
};

use super::{
    denial_report::{Denial, DenialSubject},
    request_report::ReportedRequest,
    request_rules::{Passage, ProposedRequests, SeenRequest},
};

/// Names of the endpoints of each rule of a sender: one rule for all requests, and rules for listed requests.
#[derive(Default)]
struct SenderRules<'r> {
    all_requests: BTreeSet<&'r str>,
    listed_requests: BTreeMap<ProposedRequests, BTreeSet<&'r str>>,
}

/// Returns one rule for each sender and list of requests. A sender with known requests to an endpoint of `provider` gets a rule
/// for these, otherwise one for all requests.
pub(super) fn rules(
    denials: &[Denial],
    requests: &[ReportedRequest],
    provider: &str,
    pods: &BTreeSet<String>,
) -> String {
    let mut proposed = Proposed { pods, text: String::new(), names: BTreeSet::new(), seen: BTreeSet::new() };
    for (sender, SenderRules { all_requests, listed_requests }) in by_sender(denials, requests, provider) {
        if !all_requests.is_empty() {
            proposed.add(sender, &all_requests, None);
        }
        for (requests, endpoints) in listed_requests {
            proposed.add(sender, &endpoints, Some(&requests));
        }
    }
    proposed.text
}

fn by_sender<'r>(
    denials: &'r [Denial],
    requests: &'r [ReportedRequest],
    provider: &str,
) -> BTreeMap<&'r DenialSubject, SenderRules<'r>> {
    let mut listed: BTreeMap<(&DenialSubject, &str), Vec<_>> = BTreeMap::new();
    let mut exempt = BTreeSet::new();
    for request in requests {
        if let Some(endpoint) = &request.endpoint {
            let is_unrestricted = request.passage() == Passage::Unrestricted;
            // Requests without a count of their own are unknown, so that no list can contain them.
            let Some((method, path)) = request.request().or_else(|| is_unrestricted.then_some(("", "")))
            else {
                continue;
            };
            if request.is_exempt() {
                exempt.insert((&request.sender, endpoint.as_str()));
            }
            let seen = SeenRequest { method, path, passage: request.passage() };
            listed.entry((&request.sender, endpoint)).or_default().push(seen);
        }
    }
    let mut rules: BTreeMap<_, SenderRules<'_>> = BTreeMap::new();
    // A rule of the configuration exempts these senders completely.
    for denial in denials {
        exempt.remove(&(&denial.sender, denial.endpoint.as_deref().unwrap_or_default()));
    }
    for denial in denials {
        if let Some(endpoint) = &denial.endpoint
            && !listed.contains_key(&(&denial.sender, endpoint.as_str()))
        {
            rules.entry(&denial.sender).or_default().all_requests.insert(endpoint);
        }
    }
    for ((sender, endpoint), requests) in listed {
        let mut requests = ProposedRequests::new(requests, provider);
        requests.is_exempt = exempt.contains(&(sender, endpoint));
        if requests.needs_all {
            // The present rule of an exempt sender is as narrow as possible.
            if !requests.is_exempt {
                rules.entry(sender).or_default().all_requests.insert(endpoint);
            }
        } else if !requests.is_empty() {
            rules.entry(sender).or_default().listed_requests.entry(requests).or_default().insert(endpoint);
        }
    }
    rules
}

/// Text of the rules so far.
struct Proposed<'p> {
    pods: &'p BTreeSet<String>,
    text: String,
    names: BTreeSet<String>,
    seen: BTreeSet<(String, Vec<String>)>,
}

impl Proposed<'_> {
    /// Adds a rule for a sender at endpoints: for all requests, or for those in `requests`.
    fn add(
        &mut self,
        sender: &DenialSubject,
        endpoints: &BTreeSet<&str>,
        requests: Option<&ProposedRequests>,
    ) {
        let Some((lines, caution)) = sender.rule(self.pods) else { return };
        // A list of requests works with none of the other senders.
        if requests.is_some() && sender.namespace.is_none() {
            return;
        }
        let allow: Vec<_> = requests.into_iter().flat_map(ProposedRequests::allow).cloned().collect();
        // One rule by cgroup covers all threads in it.
        if !self.seen.insert((lines.clone(), allow.clone())) {
            return;
        }
        let comment = |text: &str| format!("# {text}\n");
        let cautions: String =
            requests.into_iter().flat_map(ProposedRequests::cautions).map(|text| comment(&text)).collect();
        if requests.is_some() && allow.is_empty() {
            let endpoints = endpoints.iter().copied().collect::<Vec<_>>().join(", ");
            self.text += &comment(&format!(
                "No rule for {sender} at {endpoints}, because it makes no request that is known to be harmless:"
            ));
            self.text += &cautions;
            self.text.push('\n');
            return;
        }
        let name = sender.name();
        let numbered = (2..).map(|number| format!("{name}-{number}"));
        let mut names = iter::once(name.clone()).chain(numbered);
        let name = names.find(|name| self.names.insert(name.clone())).unwrap_or_default();
        if let Some(caution) = caution {
            self.text += &comment(&format!("This rule exempts {caution}."));
        }
        self.text += &cautions;
        let rule_start = self.text.len();
        let endpoints =
            toml::Value::from(endpoints.iter().copied().map(toml::Value::from).collect::<Vec<_>>());
        // Writing to a string does not fail.
        let _ok = writeln!(self.text, "[[exempt]]\nname = \"{name}\"\n{lines}endpoints = {endpoints}");
        if requests.is_some() {
            let allow = toml::Value::from(allow.into_iter().map(toml::Value::from).collect::<Vec<_>>());
            let _ok = writeln!(self.text, "allow = {allow}");
        }
        if requests.is_some_and(|requests| requests.is_exempt) {
            let rule: String = self.text.split_off(rule_start).lines().map(comment).collect();
            self.text +=
                &comment("Exempt from all denials today. To limit it to its requests, replace its rule by:");
            self.text += &rule;
        }
        self.text.push('\n');
    }
}
