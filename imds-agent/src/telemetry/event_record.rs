//! Converts events of the BPF programs, and HTTP requests, to text and JSON. docs/json.md describes the fields.

use std::{fmt, net::Ipv6Addr};

use imds_ebpf_common::{Event, Hook, Subject, SubjectKind, Verdict};
use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use crate::{
    encode::{hook_name, nonempty_text},
    escape::escape,
    kube::pod_ref::PodRef,
    telemetry::http_request::{HttpFields, RequestEvent},
};

/// An event, resolved for users. Later versions only add fields to the JSON form.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct EventRecord {
    pub(crate) time: Timestamp,
    pub(crate) hook: &'static str,
    pub(crate) verdict: &'static str,
    pub(crate) ifindex: Option<u32>,
    pub(crate) interface: Option<String>,
    pub(crate) ingress_ifindex: Option<u32>,
    pub(crate) ingress_interface: Option<String>,
    pub(crate) pid: Option<u32>,
    pub(crate) comm: Option<String>,
    pub(crate) cgroup: Option<u64>,
    pub(crate) netns_cookie: Option<u64>,
    pub(crate) pod: Option<PodRef>,
    pub(crate) source: Option<String>,
    pub(crate) source_port: Option<u16>,
    pub(crate) destination: String,
    pub(crate) destination_port: Option<u16>,
    pub(crate) protocol: Option<String>,
    pub(crate) suppressed: u64,
    pub(crate) bytes: u64,
    pub(crate) rule: Option<String>,
    pub(crate) http: Option<HttpFields>,
}

impl EventRecord {
    /// Converts an event. `booted` is the wall-clock time of boot, `interface` returns the name of an interface, and `pod` is
    /// the pod of the sender.
    pub fn new(
        event: &Event,
        booted: Timestamp,
        interface: impl Fn(u32) -> Option<String>,
        pod: Option<PodRef>,
    ) -> Self {
        let ifindex = (event.ifindex != 0).then_some(event.ifindex);
        let ingress = (event.ingress_ifindex != 0).then_some(event.ingress_ifindex);
        let name = |index| Some(escape(&interface(index)?).into_owned());
        let source = Ipv6Addr::from(event.source);
        Self {
            time: wall_time(event, booted),
            hook: hook_name(event.hook.into()),
            verdict: verdict(event.verdict),
            ifindex,
            interface: ifindex.and_then(&name),
            ingress_ifindex: ingress,
            ingress_interface: ingress.and_then(name),
            pid: (event.pid != 0).then_some(event.pid),
            comm: nonempty_text(&event.comm),
            cgroup: (event.cgroup != 0).then_some(event.cgroup),
            netns_cookie: (event.netns_cookie != 0).then_some(event.netns_cookie),
            pod,
            source: (!source.is_unspecified()).then(|| source.to_canonical().to_string()),
            source_port: (event.source_port != 0).then_some(event.source_port),
            destination: Ipv6Addr::from(event.destination).to_canonical().to_string(),
            destination_port: (event.destination_port != 0).then_some(event.destination_port),
            protocol: protocol(event.protocol),
            suppressed: event.suppressed,
            bytes: event.bytes,
            rule: None,
            http: None,
        }
    }

    /// Converts a request. `interface` returns the name of an interface, and `pod` is the pod of the sender.
    pub fn of_request(
        event: &RequestEvent,
        interface: impl Fn(u32) -> Option<String>,
        pod: Option<PodRef>,
    ) -> Self {
        let known = |id: u64| (id != 0).then_some(id);
        let ifindex = Some(event.sender.ifindex).filter(|&index| index != 0);
        Self {
            time: event.time,
            hook: event.hook_name(),
            verdict: event.outcome.verdict().name(),
            ifindex,
            interface: ifindex.and_then(interface).map(|name| escape(&name).into_owned()),
            ingress_ifindex: None,
            ingress_interface: None,
            pid: None,
            comm: None,
            cgroup: known(event.sender.cgroup),
            netns_cookie: known(event.sender.netns_cookie),
            pod,
            source: None,
            source_port: None,
            destination: event.endpoint.to_string(),
            destination_port: Some(event.port),
            protocol: Some("tcp".to_owned()),
            suppressed: event.suppressed,
            bytes: 0,
            rule: event.rule.clone(),
            http: Some(HttpFields::new(event)),
        }
    }

    /// Formats the sender of a request: `tools/web-7d4b9`, `veth1 (4)` or `netns 7`.
    fn write_requester(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.pod, self.ifindex) {
            (Some(pod), _) => write!(f, "{pod}"),
            (None, Some(index)) => write!(f, "{}", interface(self.interface.as_deref(), index)),
            (None, None) => write!(f, "netns {}", self.netns_cookie.unwrap_or_default()),
        }
    }
}

/// Decodes an event. Returns `None` if the bytes are too few, as from programs of another version.
pub fn decode(bytes: &[u8]) -> Option<Event> {
    let bytes = bytes.first_chunk::<{ size_of::<Event>() }>()?;
    // SAFETY: `Event` has only integers and no padding, so that any bytes of its size are a valid value; `read_unaligned`
    // needs no alignment.
    Some(unsafe { bytes.as_ptr().cast::<Event>().read_unaligned() })
}

/// Returns the wall-clock time of an event. `booted` is the wall-clock time of boot.
pub fn wall_time(event: &Event, booted: Timestamp) -> Timestamp {
    since_boot(event.time, booted)
}

/// Returns the wall-clock time that is this number of nanoseconds after `booted`.
pub(super) fn since_boot(nanoseconds: u64, booted: Timestamp) -> Timestamp {
    let since_boot = SignedDuration::from_nanos(nanoseconds.try_into().unwrap_or(i64::MAX));
    booted.checked_add(since_boot).unwrap_or(Timestamp::MAX)
}

/// Returns the index of the interface through which a packet entered the node; 0 if it entered through none.
pub fn ingress(event: &Event) -> u32 {
    // At `node_egress` the interface of the event is the one through which the packet leaves the node.
    match event.hook {
        hook if hook == Hook::FromPod as u8 => event.ifindex,
        _ => event.ingress_ifindex,
    }
}

/// Returns the identities of an event's sender, most specific first: a cgroup identifies a container, a network namespace or
/// an interface only the pod.
pub fn senders(event: &Event) -> impl Iterator<Item = Subject> {
    [
        (SubjectKind::Cgroup, event.cgroup),
        (SubjectKind::Netns, event.netns_cookie),
        (SubjectKind::Interface, ingress(event).into()),
    ]
    .into_iter()
    .filter(|(_, id)| *id != 0)
    .map(|(kind, id)| Subject::new(kind, id))
}

impl fmt::Display for EventRecord {
    /// Formats one line: `2026-11-23T15:04:05.123Z denied from_pod veth1 (4): 10.244.0.7:40312 -> 169.254.169.254:80 tcp`, or
    /// for a request `… denied broker tools/web-7d4b9 -> 169.254.169.254:80 refused GET /latest/user-data (status 403)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.3} {:7} {:11} ", self.time, self.verdict, self.hook)?;
        if self.http.is_some() {
            self.write_requester(f)?;
        } else if let Some(index) = self.ifindex {
            write!(f, "{}", interface(self.interface.as_deref(), index))?;
        } else {
            let comm = self.comm.as_deref().unwrap_or("?");
            write!(f, "{comm} (pid {})", self.pid.unwrap_or_default())?;
        }
        if let Some(ingress) = self.ingress_ifindex
            && Some(ingress) != self.ifindex
        {
            write!(f, " from {}", interface(self.ingress_interface.as_deref(), ingress))?;
        }
        if let Some(pod) = self.pod.as_ref().filter(|_| self.http.is_none()) {
            write!(f, " of {pod}")?;
        }
        if let Some(source) = &self.source {
            write!(f, ": {}", endpoint(source, self.source_port))?;
        }
        write!(f, " -> {}", endpoint(&self.destination, self.destination_port))?;
        match (&self.http, &self.protocol) {
            (Some(http), _) => write!(f, " {http}")?,
            (None, Some(protocol)) => write!(f, " {protocol}")?,
            (None, None) => {}
        }
        match self.suppressed {
            0 => Ok(()),
            suppressed => write!(f, ", {suppressed} more suppressed"),
        }
    }
}

fn interface(name: Option<&str>, index: u32) -> String {
    name.map_or_else(|| format!("interface {index}"), |name| format!("{name} ({index})"))
}

pub(super) fn endpoint(address: &str, port: Option<u16>) -> String {
    match port {
        Some(port) if address.contains(':') => format!("[{address}]:{port}"),
        Some(port) => format!("{address}:{port}"),
        None => address.to_owned(),
    }
}

pub(super) fn verdict(number: u8) -> &'static str {
    let counted = Verdict::COUNTED.into_iter().find(|&verdict| verdict as u8 == number);
    counted.map_or("unknown", Verdict::name)
}

/// Returns the name of a common IP protocol (IANA), otherwise its number.
pub(super) fn protocol(number: u8) -> Option<String> {
    Some(match number {
        1 => "icmp".to_owned(),
        6 => "tcp".to_owned(),
        17 => "udp".to_owned(),
        58 => "icmpv6".to_owned(),
        132 => "sctp".to_owned(),
        // Reserved by IANA. The programs use it if they can't find the protocol.
        255 => return None,
        other => format!("protocol {other}"),
    })
}

/// Returns the wall-clock time of boot. Setting the clock moves it.
pub fn boot_time() -> Timestamp {
    let now = Timestamp::now();
    let since_boot = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)
        .map(|time| SignedDuration::new(time.tv_sec(), time.tv_nsec().try_into().unwrap_or_default()));
    since_boot.map_or(now, |since_boot| now.checked_sub(since_boot).unwrap_or(now))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packet_as_line_and_json() {
        let event = Event {
            time: 1_500_000_000,
            suppressed: 41,
            source: std::net::Ipv4Addr::new(10, 244, 0, 7).to_ipv6_mapped().octets(),
            destination: std::net::Ipv4Addr::new(169, 254, 169, 254).to_ipv6_mapped().octets(),
            ifindex: 4,
            ingress_ifindex: 4,
            source_port: 40_312,
            destination_port: 80,
            hook: Hook::FromPod as u8,
            verdict: Verdict::Denied as u8,
            protocol: 6,
            ..Event::default()
        };
        let record =
            EventRecord::new(&event, Timestamp::UNIX_EPOCH, |index| Some(format!("veth{index}")), None);
        assert_eq!(
            record.to_string(),
            "1970-01-01T00:00:01.500Z denied  from_pod    veth4 (4): 10.244.0.7:40312 -> 169.254.169.254:80 tcp, 41 more \
             suppressed"
        );
        let json = serde_json::to_value(&record).unwrap();
        assert_eq!((&json["interface"], &json["pid"]), (&"veth4".into(), &serde_json::Value::Null));
    }

    #[test]
    fn request_as_line_and_json() {
        let event = crate::telemetry::http_request::tests::refused("/latest/user-data");
        let record = EventRecord::of_request(&event, |_| None, None);
        assert_eq!(
            record.to_string(),
            "1970-01-01T00:00:01.500Z denied  broker      netns 7 -> 169.254.169.254:80 refused GET /latest/user-data \
             (IMDSv1, status 403, no rule allows it), 3 more suppressed"
        );
        let json = serde_json::to_value(&record).unwrap();
        assert_eq!((&json["rule"], &json["netns_cookie"]), (&"region".into(), &7.into()));
        let http = serde_json::json!({
            "method": "GET", "path": "/latest/user-data", "imds_version": 1, "outcome": "refused", "status": 403,
            "reason": "no rule allows it", "other_rules": 1,
        });
        assert_eq!(json["http"], http);
    }

    #[test]
    fn call_as_line() {
        let mut event = Event {
            destination: [0xfd, 0, 0xe, 0xc2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0x54],
            destination_port: 80,
            pid: 1234,
            hook: Hook::Socket as u8,
            verdict: Verdict::Audited as u8,
            protocol: 17,
            ..Event::default()
        };
        event.comm[..4].copy_from_slice(b"curl");
        let record = EventRecord::new(&event, Timestamp::UNIX_EPOCH, |_| None, None);
        assert_eq!(
            record.to_string(),
            "1970-01-01T00:00:00.000Z audited socket      curl (pid 1234) -> [fd00:ec2::254]:80 udp"
        );
    }
}
