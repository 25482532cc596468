//! Requests in the report: one row for each sender, endpoint, request and outcome. docs/json.md describes the fields.

use std::{collections::BTreeSet, net::IpAddr};

use comfy_table::{Table, presets::NOTHING};
use jiff::Timestamp;
use serde::Serialize;

use super::{denial_report::DenialSubject, http_request::RequestOutcome, request_rules::Passage};
use crate::{
    config::endpoint_set::Endpoint,
    datapath::maps::request_log::{RequestCount, RequestKey},
    encode::{field_text, ip_address, nonempty_text, raw_field_text, timestamp},
};

/// Requests of one sender with equal method, path, version and outcome.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub(crate) struct ReportedRequest {
    #[serde(flatten)]
    pub(super) sender: DenialSubject,
    /// Network namespace of the sender, unless the pod is known.
    pub(super) netns_cookie: Option<u64>,
    pub(super) pod: Option<String>,
    pub(super) endpoint: Option<String>,
    pub(super) address: IpAddr,
    /// `None` for all requests of the sender that are not counted separately.
    pub(super) method: Option<String>,
    pub(super) path: Option<String>,
    pub(super) imds_version: Option<u8>,
    pub(super) outcome: &'static str,
    pub(super) count: u64,
    pub(super) first: Timestamp,
    pub(super) last: Timestamp,
}

impl ReportedRequest {
    /// Converts the entries of the log, sorted by sender. Leaves out entries of another version.
    pub(crate) fn from_counts(counts: &[(RequestKey, RequestCount)], protected: &[Endpoint]) -> Vec<Self> {
        let mut requests: Vec<_> =
            counts.iter().filter_map(|(key, count)| Self::new(key, count, protected)).collect();
        requests.sort_by(|a, b| a.sort_key().cmp(&b.sort_key()));
        requests
    }

    fn new(key: &RequestKey, count: &RequestCount, protected: &[Endpoint]) -> Option<Self> {
        let address = ip_address(key.endpoint);
        let texts: [&[u8]; 3] = [&count.namespace, &count.service_account, &count.label];
        let sender = DenialSubject {
            is_escaped: texts.iter().any(|name| raw_field_text(name) != Some(&field_text(name))),
            namespace: nonempty_text(&count.namespace),
            service_account: nonempty_text(&count.service_account),
            label: nonempty_text(&count.label),
            interface: None,
            comm: None,
            cgroup: None,
        };
        let named = protected.iter().find(|endpoint| endpoint.address == address);
        Some(Self {
            sender,
            netns_cookie: (count.netns_cookie != 0).then_some(count.netns_cookie),
            pod: nonempty_text(&count.pod),
            endpoint: named.map(|endpoint| endpoint.name.clone()),
            address,
            method: nonempty_text(&key.method),
            path: nonempty_text(&key.path),
            imds_version: (key.imds_version != 0).then_some(key.imds_version),
            outcome: RequestOutcome::from_number(key.outcome)?.name(),
            count: count.count,
            first: timestamp(count.first),
            last: timestamp(count.last),
        })
    }

    fn sort_key(&self) -> impl Ord + '_ {
        let sender = (&self.sender, self.netns_cookie, self.address);
        // The other requests of a sender come last.
        (sender, self.path.is_none(), &self.path, &self.method, self.imds_version, self.outcome)
    }

    fn sender_name(&self) -> String {
        match (&self.sender.namespace, self.netns_cookie) {
            (None, Some(cookie)) => format!("netns {cookie}"),
            _ => self.sender.to_string(),
        }
    }

    /// Reports whether the requests passed because the sender is exempt.
    pub(super) fn is_exempt(&self) -> bool {
        self.outcome == RequestOutcome::Exempt.name()
    }

    /// Returns the reason why the requests passed, or did not. The endpoint may have failed to answer an allowed one.
    pub(super) fn passage(&self) -> Passage {
        let is = |outcomes: &[RequestOutcome]| outcomes.iter().any(|outcome| self.outcome == outcome.name());
        if is(&[RequestOutcome::Exempt, RequestOutcome::Audited]) {
            Passage::Unrestricted
        } else if is(&[RequestOutcome::Allowed, RequestOutcome::Failed]) {
            Passage::Listed
        } else {
            Passage::Refused
        }
    }

    /// Returns method and path, unless this is the row of the other requests.
    pub(super) fn request(&self) -> Option<(&str, &str)> {
        self.method.as_deref().zip(self.path.as_deref())
    }
}

/// Returns the requests as text; empty without any.
pub(super) fn table(requests: &[ReportedRequest]) -> String {
    if requests.is_empty() {
        return String::new();
    }
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.set_header(["SENDER", "ENDPOINT", "REQUEST", "IMDS", "OUTCOME", "COUNT", "LAST"]);
    let mut version_1 = BTreeSet::new();
    for request in requests {
        if request.imds_version == Some(1) {
            version_1.insert(request.sender_name());
        }
        table.add_row([
            request.sender_name(),
            request.endpoint.clone().unwrap_or_else(|| request.address.to_string()),
            request.request().map_or("(other)".to_owned(), |(method, path)| format!("{method} {path}")),
            request.imds_version.map_or("-".to_owned(), |version| format!("v{version}")),
            request.outcome.to_owned(),
            request.count.to_string(),
            format!("{:.0}", request.last),
        ]);
    }
    let mut text = format!("{}\n", table.trim_fmt());
    if !version_1.is_empty() {
        let senders = version_1.into_iter().collect::<Vec<_>>().join(", ");
        text.push_str("\nrequests without a session token (IMDSv1): ");
        text.push_str(&senders);
        text.push('\n');
    }
    text
}

#[cfg(test)]
pub(super) mod tests {
    use imds_ebpf_common::Address;

    use super::*;
    use crate::encode::text_field;

    /// Returns the count of a request of the pod `web-0`, or of an unknown pod if `namespace` is empty.
    pub(crate) fn entry(
        namespace: &str,
        method: &str,
        path: &str,
        outcome: RequestOutcome,
    ) -> (RequestKey, RequestCount) {
        let key = RequestKey {
            endpoint: Address::from_ipv4([169, 254, 169, 254]),
            sender: 7,
            outcome: outcome as u8,
            imds_version: 1,
            reserved: [0; _],
            method: text_field(method),
            path: text_field(path),
        };
        let is_known = !namespace.is_empty();
        let count = RequestCount {
            count: 2,
            first: 1_000_000_000,
            last: 2_000_000_000,
            netns_cookie: if is_known { 0 } else { 4026 },
            namespace: text_field(namespace),
            service_account: text_field(if is_known { "web" } else { "" }),
            label: text_field(""),
            pod: text_field(if is_known { "web-0" } else { "" }),
        };
        (key, count)
    }

    #[test]
    fn requests_as_table() {
        let (other, count) = entry("tools", "", "", RequestOutcome::Refused);
        let v2 = |(key, count): (RequestKey, RequestCount)| (RequestKey { imds_version: 2, ..key }, count);
        let counts = [
            (RequestKey { imds_version: 0, ..other }, count),
            v2(entry("tools", "PUT", "/latest/api/token", RequestOutcome::Allowed)),
            entry("tools", "GET", "/a\n\x1b", RequestOutcome::Refused),
            entry("", "GET", "/b", RequestOutcome::Failed),
        ];
        let requests = ReportedRequest::from_counts(&counts, &[]);
        let expected = r" SENDER      ENDPOINT         REQUEST                IMDS  OUTCOME  COUNT  LAST
 netns 4026  169.254.169.254  GET /b                 v1    failed   2      1970-01-01T00:00:02Z
 tools/web   169.254.169.254  GET /a\n\u{1b}         v1    refused  2      1970-01-01T00:00:02Z
 tools/web   169.254.169.254  PUT /latest/api/token  v2    allowed  2      1970-01-01T00:00:02Z
 tools/web   169.254.169.254  (other)                -     refused  2      1970-01-01T00:00:02Z

requests without a session token (IMDSv1): netns 4026, tools/web
";
        assert_eq!(table(&requests), expected);
        assert_eq!(table(&[]), "");
        let json = serde_json::to_value(&requests[1]).unwrap();
        assert_eq!(
            (&json["namespace"], &json["pod"], &json["path"], &json["netns_cookie"]),
            (&"tools".into(), &"web-0".into(), &r"/a\n\u{1b}".into(), &serde_json::Value::Null)
        );
    }
}
