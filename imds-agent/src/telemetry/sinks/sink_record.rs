//! Record of a denied or audited packet or call, or of an HTTP request, as sinks write it. docs/siem.md describes the fields.

use std::{
    fmt,
    net::{IpAddr, Ipv6Addr},
};

use imds_ebpf_common::Verdict;
use jiff::Timestamp;
use serde::Serialize;

use super::SinkSettings;
use crate::{
    encode::{hook_name, nonempty_text},
    escape::{escape, escape_bytes, to_json},
    kube::pod_ref::PodRef,
    telemetry::{
        denial::Denial,
        event_record,
        http_request::{HttpFields, RequestEvent},
    },
};

/// Version of the fields. Removed and changed fields increase it.
const SCHEMA: u32 = 1;

/// Record of one event. The names of `src_endpoint`, `dst_endpoint` and `actor` are those of OCSF.
#[derive(Clone, Debug, Serialize)]
pub(super) struct SinkRecord {
    pub(super) schema: u32,
    pub(super) time: Timestamp,
    pub(super) node: String,
    pub(super) verdict: &'static str,
    pub(super) hook: &'static str,
    pub(super) protocol: Option<String>,
    pub(super) src_endpoint: Source,
    pub(super) dst_endpoint: Destination,
    pub(super) pod: Option<PodFields>,
    pub(super) actor: Actor,
    pub(super) rule: Option<String>,
    pub(super) count: u64,
    pub(super) bytes: u64,
    pub(super) http: Option<HttpFields>,
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct Source {
    pub(super) ip: Option<IpAddr>,
    pub(super) port: Option<u16>,
    pub(super) interface_name: Option<String>,
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct Destination {
    pub(super) name: Option<String>,
    pub(super) ip: IpAddr,
    pub(super) port: Option<u16>,
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct PodFields {
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) uid: String,
    pub(super) service_account: String,
    pub(super) container: Option<String>,
    pub(super) label: Option<String>,
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct Actor {
    pub(super) process: Option<Process>,
    pub(super) cgroup: Option<String>,
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct Process {
    pub(super) pid: u32,
    pub(super) name: Option<String>,
}

impl SinkRecord {
    pub(super) fn new(denial: &Denial, settings: &SinkSettings) -> Self {
        let event = &denial.event;
        let nonzero = |port: u16| (port != 0).then_some(port);
        let source = Ipv6Addr::from(event.source);
        let destination = Ipv6Addr::from(event.destination).to_canonical();
        Self {
            schema: SCHEMA,
            time: denial.time,
            node: escape(&settings.node).into_owned(),
            verdict: event_record::verdict(event.verdict),
            hook: hook_name(event.hook.into()),
            protocol: event_record::protocol(event.protocol),
            src_endpoint: Source {
                ip: (!source.is_unspecified()).then(|| source.to_canonical()),
                port: nonzero(event.source_port),
                interface_name: nonempty(escape(&denial.interface).into_owned()),
            },
            dst_endpoint: Destination {
                name: settings.endpoint(destination).map(str::to_owned),
                ip: destination,
                port: nonzero(event.destination_port),
            },
            pod: denial.pod.as_ref().map(PodFields::new),
            actor: Actor {
                process: (event.pid != 0)
                    .then(|| Process { pid: event.pid, name: nonempty_text(&event.comm) }),
                cgroup: nonempty(escape_bytes(&denial.unit)),
            },
            rule: denial.rule.map(|number| settings.rule(number)),
            count: event.suppressed.saturating_add(1),
            bytes: event.bytes,
            http: None,
        }
    }

    /// Returns the record of a request of a pod, if it is known.
    pub(super) fn of_request(event: &RequestEvent, pod: Option<&PodRef>, settings: &SinkSettings) -> Self {
        Self {
            schema: SCHEMA,
            time: event.time,
            node: escape(&settings.node).into_owned(),
            verdict: event.outcome.verdict().name(),
            hook: event.hook_name(),
            protocol: Some("tcp".to_owned()),
            src_endpoint: Source { ip: None, port: None, interface_name: None },
            dst_endpoint: Destination {
                name: settings.endpoint(event.endpoint).map(str::to_owned),
                ip: event.endpoint,
                port: Some(event.port),
            },
            pod: pod.map(PodFields::new),
            actor: Actor { process: None, cgroup: None },
            rule: event.rule.clone(),
            count: event.suppressed.saturating_add(1),
            bytes: 0,
            http: Some(HttpFields::new(event)),
        }
    }

    /// Returns the record as a line of JSON with a newline.
    pub(super) fn line(&self) -> Vec<u8> {
        // Cannot fail: all keys are strings.
        let json = to_json(self).unwrap_or_default();
        (json + "\n").into_bytes()
    }

    pub(super) fn is_denied(&self) -> bool {
        self.verdict == Verdict::Denied.name()
    }

    pub(super) fn is_audited(&self) -> bool {
        self.verdict == Verdict::Audited.name()
    }

    /// Returns an estimate of the memory that the record takes, from the lengths of its long texts.
    pub(super) fn size(&self) -> usize {
        let pod = self.pod.as_ref().map_or(0, |pod| {
            pod.namespace.len()
                + pod.name.len()
                + pod.service_account.len()
                + pod.label.as_ref().map_or(0, String::len)
        });
        let http = self.http.as_ref().map_or(0, |http| {
            http.method.len() + http.path.len() + http.reason.as_ref().map_or(0, String::len)
        });
        size_of::<Self>() + pod + http + self.node.len() + self.actor.cgroup.as_ref().map_or(0, String::len)
    }
}

impl fmt::Display for SinkRecord {
    /// Formats one line: `denied tcp 10.244.0.7:40312 -> 169.254.169.254:80 (imds) at from_pod, pod default/web, 3 times`. A
    /// request has its outcome, method and path at the start: `refused GET /latest/user-data (IMDSv1, status 403) -> …`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { src_endpoint: source, dst_endpoint: destination, .. } = self;
        match &self.http {
            Some(http) => write!(f, "{http} -> ")?,
            None => write!(f, "{} {} ", self.verdict, self.protocol.as_deref().unwrap_or("packet"))?,
        }
        if let Some(ip) = source.ip {
            write!(f, "{} -> ", event_record::endpoint(&ip.to_string(), source.port))?;
        }
        write!(f, "{}", event_record::endpoint(&destination.ip.to_string(), destination.port))?;
        if let Some(name) = &destination.name {
            write!(f, " ({name})")?;
        }
        write!(f, " at {}", self.hook)?;
        if let Some(PodFields { namespace, name, container, .. }) = &self.pod {
            write!(f, ", pod {namespace}/{name}")?;
            container.iter().try_for_each(|container| write!(f, "[{container}]"))?;
        } else if let Some(interface) = &source.interface_name {
            write!(f, ", interface {interface}")?;
        }
        if let Some(Process { pid, name }) = &self.actor.process {
            write!(f, ", process {} (pid {pid})", name.as_deref().unwrap_or("?"))?;
        }
        if self.count > 1 { write!(f, ", {} times", self.count) } else { Ok(()) }
    }
}

impl PodFields {
    fn new(pod: &PodRef) -> Self {
        let escaped = |text: &str| escape(text).into_owned();
        Self {
            namespace: escaped(&pod.namespace),
            name: escaped(&pod.pod),
            uid: escaped(&pod.uid),
            service_account: escaped(&pod.service_account),
            container: pod.container.as_deref().map(escaped),
            label: pod.label.as_deref().map(escaped),
        }
    }
}

fn nonempty(text: String) -> Option<String> {
    Some(text).filter(|text| !text.is_empty())
}
