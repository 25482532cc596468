//! HTTP requests of pods to metadata services, as their sources report them: the broker of scoped exemptions, and programs that
//! see the first line of a request.

use std::{fmt, net::IpAddr};

use imds_broker::protocol::{self, Outcome};
use imds_ebpf_common::{Hook, Subject, SubjectKind, Verdict};
use jiff::Timestamp;
use serde::Serialize;

use crate::{
    datapath::maps::request_log::RequestRecord,
    encode::{address_key, field_text, ip_address, nanoseconds, nonempty_text, text_field, timestamp},
    escape::escape,
};

/// First line of a request, without query. The pod chooses both texts: they are escaped when they are read from the log.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct HttpRequest {
    /// Method; empty if it is unknown.
    pub method: String,
    /// Path without query, at most 256 bytes.
    pub path: String,
    /// Version of the IMDS of AWS: 1 for a request without a session token, 2 with one. `None` for other providers.
    pub imds_version: Option<u8>,
}

/// Result of a request.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
#[repr(u8)]
pub enum RequestOutcome {
    /// The broker forwarded the request, and the response to the pod.
    Allowed = 1,
    /// The broker refused the request.
    Refused = 2,
    /// The broker could not forward the request.
    Failed = 3,
    /// The pod is exempt: the request reached the endpoint.
    Exempt = 4,
    /// The request reached the endpoint, but `enforce` mode or the removal of an audited exemption would deny it.
    Audited = 5,
}

impl RequestOutcome {
    const ALL: [Self; 5] = [Self::Allowed, Self::Refused, Self::Failed, Self::Exempt, Self::Audited];

    /// Returns the outcome with this number in the log.
    pub(crate) fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|&outcome| outcome as u8 == number)
    }

    /// Returns the name in outputs.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Allowed => "allowed",
            Self::Refused => "refused",
            Self::Failed => "failed",
            Self::Exempt => "exempt",
            Self::Audited => "audited",
        }
    }

    /// Returns the verdict that the outcome counts as. A request that could not be forwarded was allowed.
    pub(crate) const fn verdict(self) -> Verdict {
        match self {
            Self::Allowed | Self::Failed => Verdict::Allowed,
            Self::Refused => Verdict::Denied,
            Self::Exempt => Verdict::Exempt,
            Self::Audited => Verdict::Audited,
        }
    }
}

impl From<Outcome> for RequestOutcome {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Allowed => Self::Allowed,
            Outcome::Refused => Self::Refused,
            Outcome::Failed => Self::Failed,
        }
    }
}

/// Identities of the sender of a request; 0 for unknown ones.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct RequestSender {
    /// Cookie of the network namespace.
    pub netns_cookie: u64,
    /// Id of the cgroup.
    pub cgroup: u64,
    /// Index of the interface through which the request entered the node.
    pub ifindex: u32,
}

impl RequestSender {
    /// Returns the identities, most specific first.
    pub(crate) fn subjects(&self) -> impl Iterator<Item = Subject> + use<> {
        [
            (SubjectKind::Cgroup, self.cgroup),
            (SubjectKind::Netns, self.netns_cookie),
            (SubjectKind::Interface, self.ifindex.into()),
        ]
        .into_iter()
        .filter(|(_, id)| *id != 0)
        .map(|(kind, id)| Subject::new(kind, id))
    }
}

/// Request of a pod, and its result.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct RequestEvent {
    /// Time of the result.
    pub time: Timestamp,
    /// Hook that saw the request; `None` for the broker.
    pub hook: Option<Hook>,
    /// Sender of the request.
    pub sender: RequestSender,
    /// Address of the protected endpoint.
    pub endpoint: IpAddr,
    /// Port of the endpoint.
    pub port: u16,
    /// The request itself.
    pub request: HttpRequest,
    /// Result.
    pub outcome: RequestOutcome,
    /// HTTP status that the pod received, if it is known.
    pub status: Option<u16>,
    /// Reason why the broker refused the request or could not forward it.
    pub reason: Option<String>,
    /// Name of the first rule that matches the sender.
    pub rule: Option<String>,
    /// Number of further rules that match the sender.
    pub other_rules: u32,
    /// Further requests of the sender with the same outcome that were suppressed before this one.
    pub suppressed: u64,
}

impl RequestEvent {
    /// Converts a message of the broker about a request of the network namespace `netns_cookie`.
    pub(crate) fn from_broker(
        request: protocol::Request,
        netns_cookie: u64,
        (endpoint, port): (IpAddr, u16),
        (rule, other_rules): (Option<String>, u32),
    ) -> Self {
        let protocol::Request { method, path, imds_version, outcome, status, reason, suppressed, .. } =
            request;
        Self {
            time: Timestamp::now(),
            hook: None,
            sender: RequestSender { netns_cookie, ..RequestSender::default() },
            endpoint,
            port,
            request: HttpRequest { method, path, imds_version },
            outcome: outcome.into(),
            status: Some(status),
            reason: Some(reason).filter(|reason| !reason.is_empty()),
            rule,
            other_rules,
            suppressed,
        }
    }

    /// Converts the entry of the log. Returns `None` for an outcome of another version.
    pub(crate) fn from_record(record: &RequestRecord) -> Option<Self> {
        let known = |number| (number != 0).then_some(number);
        Some(Self {
            time: timestamp(record.time),
            hook: Hook::ALL.into_iter().find(|&hook| hook as u32 == record.hook),
            sender: RequestSender {
                netns_cookie: record.netns_cookie,
                cgroup: record.cgroup,
                ifindex: record.ifindex,
            },
            endpoint: ip_address(record.endpoint),
            port: record.port,
            request: HttpRequest {
                method: field_text(&record.method),
                path: field_text(&record.path),
                imds_version: (record.imds_version != 0).then_some(record.imds_version),
            },
            outcome: RequestOutcome::from_number(record.outcome)?,
            status: known(record.status),
            reason: nonempty_text(&record.reason),
            rule: nonempty_text(&record.rule),
            other_rules: record.other_rules,
            suppressed: record.suppressed,
        })
    }

    /// Returns the entry of the log.
    pub(crate) fn to_record(&self) -> RequestRecord {
        let HttpRequest { method, path, imds_version } = &self.request;
        RequestRecord {
            time: nanoseconds(self.time),
            suppressed: self.suppressed,
            netns_cookie: self.sender.netns_cookie,
            cgroup: self.sender.cgroup,
            ifindex: self.sender.ifindex,
            hook: self.hook.map_or(0, |hook| hook as u32),
            endpoint: address_key(self.endpoint),
            other_rules: self.other_rules,
            port: self.port,
            status: self.status.unwrap_or_default(),
            outcome: self.outcome as u8,
            imds_version: imds_version.unwrap_or_default(),
            reserved: [0; _],
            rule: text_field(self.rule.as_deref().unwrap_or_default()),
            method: text_field(method),
            path: text_field(path),
            reason: text_field(self.reason.as_deref().unwrap_or_default()),
        }
    }

    /// Returns the name of the hook, or `broker`.
    pub(crate) fn hook_name(&self) -> &'static str {
        self.hook.map_or("broker", Hook::name)
    }
}

/// Fields of a request in events and in the records of sinks, which packets and calls do not have.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct HttpFields {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) imds_version: Option<u8>,
    pub(crate) outcome: &'static str,
    pub(crate) status: Option<u16>,
    pub(crate) reason: Option<String>,
    pub(crate) other_rules: u32,
}

impl HttpFields {
    /// Returns the escaped fields.
    pub(crate) fn new(event: &RequestEvent) -> Self {
        let HttpRequest { method, path, imds_version } = &event.request;
        Self {
            method: escape(method).into_owned(),
            path: escape(path).into_owned(),
            imds_version: *imds_version,
            outcome: event.outcome.name(),
            status: event.status,
            reason: event.reason.as_deref().map(|reason| escape(reason).into_owned()),
            other_rules: event.other_rules,
        }
    }
}

impl fmt::Display for HttpFields {
    /// Formats outcome and request: `refused GET /latest/user-data (IMDSv1, status 403, REASON)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.outcome, self.method, self.path)?;
        let version = self.imds_version.map(|version| format!("IMDSv{version}"));
        let status = self.status.map(|status| format!("status {status}"));
        let details: Vec<_> = [version, status, self.reason.clone()].into_iter().flatten().collect();
        if details.is_empty() { Ok(()) } else { write!(f, " ({})", details.join(", ")) }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Returns a refused request of a pod.
    pub(crate) fn refused(path: &str) -> RequestEvent {
        RequestEvent {
            time: timestamp(1_500_000_000),
            hook: None,
            sender: RequestSender { netns_cookie: 7, ..RequestSender::default() },
            endpoint: IpAddr::from([169, 254, 169, 254]),
            port: 80,
            request: HttpRequest { method: "GET".to_owned(), path: path.to_owned(), imds_version: Some(1) },
            outcome: RequestOutcome::Refused,
            status: Some(403),
            reason: Some("no rule allows it".to_owned()),
            rule: Some("region".to_owned()),
            other_rules: 1,
            suppressed: 3,
        }
    }

    #[test]
    fn request_survives_the_record() {
        let event = refused("/latest/user-data");
        assert_eq!(RequestEvent::from_record(&event.to_record()).unwrap(), event);
        let seen = RequestEvent {
            hook: Some(Hook::FromPod),
            sender: RequestSender { netns_cookie: 0, cgroup: 8, ifindex: 4 },
            request: HttpRequest { imds_version: None, ..event.request.clone() },
            outcome: RequestOutcome::Audited,
            status: None,
            reason: None,
            rule: None,
            ..event
        };
        assert_eq!(RequestEvent::from_record(&seen.to_record()).unwrap(), seen);
        let kinds: Vec<_> = seen.sender.subjects().map(|subject| subject.kind).collect();
        assert_eq!(kinds, [SubjectKind::Cgroup as u64, SubjectKind::Interface as u64]);
        let unknown = RequestRecord { outcome: 99, ..seen.to_record() };
        assert_eq!(RequestEvent::from_record(&unknown), None);
    }

    #[test]
    fn texts_are_bounded_and_escaped() {
        let mut event = refused(&format!("/a\n\x1b{}", "x".repeat(300)));
        event.request.method = "M".repeat(20);
        let read = RequestEvent::from_record(&event.to_record()).unwrap();
        assert_eq!(read.request.method, "M".repeat(16));
        assert!(read.request.path.starts_with(r"/a\n\u{1b}xxx") && read.request.path.len() < 270);
    }
}
