//! Requests of all nodes.

use std::{collections::BTreeMap, fmt};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::commands::output::Columns;

/// Requests that a report can have. Beyond them, a compromised node could exhaust the memory.
const MAX_REQUESTS: usize = 20_000;

/// Requests of one sender on one node.
#[derive(Debug, Deserialize)]
pub(crate) struct NodeRequests {
    #[serde(flatten)]
    key: RequestKey,
    count: u64,
    first: Timestamp,
    last: Timestamp,
}

/// Sender, endpoint, request and outcome. Requests with equal keys are those of one application on different nodes.
#[derive(Clone, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub(crate) struct RequestKey {
    namespace: Option<String>,
    service_account: Option<String>,
    label: Option<String>,
    endpoint: Option<String>,
    address: String,
    path: Option<String>,
    method: Option<String>,
    imds_version: Option<u8>,
    outcome: String,
}

/// Sum over all nodes.
#[derive(Clone, Debug, Serialize)]
pub(super) struct MergedRequest {
    #[serde(flatten)]
    key: RequestKey,
    nodes: usize,
    count: u64,
    first: Timestamp,
    last: Timestamp,
}

/// Requests of the nodes that have answered so far.
#[derive(Debug, Default)]
pub(super) struct MergedRequests {
    requests: BTreeMap<RequestKey, MergedRequest>,
    dropped: usize,
}

impl MergedRequests {
    /// Adds the requests of a node.
    pub(super) fn add(&mut self, requests: Vec<NodeRequests>) {
        // Senders without a known pod differ on a node only by a number that other nodes reuse.
        let mut of_node = BTreeMap::<RequestKey, MergedRequest>::new();
        for NodeRequests { key, count, first, last } in requests {
            let one = MergedRequest { key: key.clone(), nodes: 1, count, first, last };
            of_node.entry(key).and_modify(|sum| sum.merge(&one, 0)).or_insert(one);
        }
        for (key, one) in of_node {
            if let Some(sum) = self.requests.get_mut(&key) {
                sum.merge(&one, 1);
            } else if self.requests.len() < MAX_REQUESTS {
                self.requests.insert(key, one);
            } else {
                self.dropped += 1;
            }
        }
    }

    /// Returns the requests by sender, and the number of those beyond the limit.
    pub(super) fn finish(self) -> (Vec<MergedRequest>, usize) {
        (self.requests.into_values().collect(), self.dropped)
    }
}

impl MergedRequest {
    fn merge(&mut self, other: &Self, nodes: usize) {
        self.nodes += nodes;
        self.count = self.count.saturating_add(other.count);
        self.first = self.first.min(other.first);
        self.last = self.last.max(other.last);
    }
}

impl RequestKey {
    fn sender(&self) -> impl fmt::Display {
        fmt::from_fn(|f| match &self.namespace {
            Some(namespace) => {
                write!(f, "{namespace}/{}", self.service_account.as_deref().unwrap_or("?"))?;
                self.label.iter().try_for_each(|label| write!(f, " {label}"))
            }
            None => write!(f, "unknown"),
        })
    }
}

/// Returns the requests as text; empty without any.
pub(super) fn table(requests: &[MergedRequest]) -> String {
    let titles = ["SENDER", "ENDPOINT", "REQUEST", "IMDS", "OUTCOME", "NODES", "COUNT", "LAST"];
    let mut columns = Columns::new(titles);
    for MergedRequest { key, nodes, count, last, .. } in requests {
        let request = key.method.as_ref().zip(key.path.as_ref());
        columns.add([
            key.sender().to_string(),
            key.endpoint.clone().unwrap_or_else(|| key.address.clone()),
            request.map_or("(other)".to_owned(), |(method, path)| format!("{method} {path}")),
            key.imds_version.map_or("-".to_owned(), |version| format!("v{version}")),
            key.outcome.clone(),
            nodes.to_string(),
            count.to_string(),
            format!("{last:.0}"),
        ]);
    }
    columns.finish()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn requests(path: Option<&str>, count: u64, last: &str) -> NodeRequests {
        serde_json::from_value(json!({
            "namespace": "tools", "service_account": "web", "label": "app=web", "interface": null, "comm": null,
            "cgroup": null, "netns_cookie": null, "pod": "web-1", "endpoint": "imds", "address": "169.254.169.254",
            "method": path.map(|_| "GET"), "path": path, "imds_version": path.map(|_| 1), "outcome": "refused",
            "count": count, "first": last, "last": last,
        }))
        .unwrap()
    }

    #[test]
    fn equal_requests_are_merged() {
        let (early, late) = ("2026-11-23T15:04:05Z", "2026-11-23T16:04:05Z");
        let mut merged = MergedRequests::default();
        merged.add(vec![requests(Some("/a\n"), 2, late), requests(None, 7, early), requests(None, 1, early)]);
        merged.add(vec![requests(Some("/a\n"), 3, early)]);
        let (requests, dropped) = merged.finish();
        assert_eq!(dropped, 0);
        let expected = r" SENDER             ENDPOINT  REQUEST   IMDS  OUTCOME  NODES  COUNT  LAST
 tools/web app=web  imds      (other)   -     refused  1      8      2026-11-23T15:04:05Z
 tools/web app=web  imds      GET /a\n  v1    refused  2      5      2026-11-23T16:04:05Z
";
        assert_eq!(table(&requests), expected);
        let json = serde_json::to_value(&requests[1]).unwrap();
        assert_eq!(
            (&json["nodes"], &json["path"], &json["first"]),
            (&2.into(), &"/a\n".into(), &early.into())
        );
    }

    #[test]
    fn number_of_requests_is_limited() {
        let mut merged = MergedRequests::default();
        let path = |number: usize| format!("/{number}");
        let of_node =
            (0..MAX_REQUESTS + 2).map(|number| requests(Some(&path(number)), 1, "2026-11-23T15:04:05Z"));
        merged.add(of_node.collect());
        let (requests, dropped) = merged.finish();
        assert_eq!((requests.len(), dropped), (MAX_REQUESTS, 2));
    }
}
