//! Records requests: the last ones, and counts by sender and request, with a bound for each sender.

use std::{
    borrow::Cow,
    collections::{HashMap, HashSet},
    hash::{BuildHasher as _, DefaultHasher, Hash as _, Hasher as _, RandomState},
    time::{Duration, Instant},
};

use imds_ebpf_common::{Subject, redirect::HTTP_PORT};

use super::{
    collector::{CollectorError, sender_id},
    http_request::RequestEvent,
};
use crate::{
    datapath::{
        maps::{
            pod_names::Names,
            request_log::{RequestCount, RequestKey, RequestLog, RequestSource},
        },
        object,
        pin::dir::PinDir,
    },
    encode::{address_key, nanoseconds, text_field},
    kube::pod_ref::PodRef,
};

/// Largest number of different requests, by method and path, that are counted separately for a sender.
const MAX_REQUESTS: usize = 32;

/// Writer of the requests of one source.
pub(crate) struct RequestRecorder {
    pins: PinDir,
    source: RequestSource,
    open: Option<(RequestLog, Names)>,
    known: KnownRequests,
    /// Senders without a known pod, by their number in the keys.
    unresolved: HashMap<u64, (Subject, Instant)>,
}

/// Shortest time between two reads of all counts, which takes milliseconds.
const SCAN_INTERVAL: Duration = Duration::from_secs(10);
/// Largest number of senders whose pod may become known later, and the time in which it does. A later pod may have got the interface index of
/// the sender.
const MAX_UNRESOLVED: usize = 1024;
const RESOLVE_TIME: Duration = Duration::from_mins(1);

/// Requests that are counted separately.
#[derive(Debug, Default)]
struct KnownRequests {
    by_sender: HashMap<u64, HashSet<u64>>,
    /// Time of the last read of all counts.
    scanned: Option<Instant>,
    /// Has random keys: a pod must not find two requests with equal hashes.
    hasher: RandomState,
}

impl RequestRecorder {
    /// Returns a recorder that opens the log with the first request.
    pub(crate) fn new(pins: PinDir, source: RequestSource) -> Self {
        Self { pins, source, open: None, known: KnownRequests::default(), unresolved: HashMap::new() }
    }

    /// Records a request. Returns the pod of its sender, if it is known.
    pub(crate) fn record(&mut self, event: &RequestEvent) -> Result<Option<PodRef>, CollectorError> {
        // Without a bpffs, the agent pins no map.
        if !object::is_loaded(&self.pins) {
            return Ok(None);
        }
        let (log, names) = match &mut self.open {
            Some(open) if open.0.is_pinned(&self.pins) => open,
            closed => {
                self.known = KnownRequests::default();
                closed.insert((RequestLog::open_or_create(&self.pins)?, Names::open(&self.pins)?))
            }
        };
        let pod = event.sender.subjects().find_map(|subject| names.get(subject));
        log.push(self.source, &event.to_record())?;
        let key = key(event, pod.as_ref());
        if pod.is_none() && self.unresolved.len() < MAX_UNRESOLVED {
            let subject = event.sender.subjects().next();
            self.unresolved.extend(subject.map(|subject| (key.sender, (subject, Instant::now()))));
        }
        add(log, &mut self.known, &key, (event, pod.as_ref()), 1)?;
        if event.suppressed > 0 {
            let other = RequestKey { imds_version: 0, ..other(&key) };
            add(log, &mut self.known, &other, (event, pod.as_ref()), event.suppressed)?;
        }
        Ok(pod)
    }

    /// Moves the counts of senders whose pods became known to these pods.
    pub(crate) fn merge_resolved(&mut self) -> Result<(), CollectorError> {
        let Some((log, names)) = &mut self.open else { return Ok(()) };
        let mut resolved = HashMap::new();
        self.unresolved.retain(|_, (_, seen)| seen.elapsed() < RESOLVE_TIME);
        self.unresolved.retain(|&sender, (subject, _)| match names.get(*subject) {
            Some(pod) => resolved.insert(sender, pod).is_some(),
            None => true,
        });
        if resolved.is_empty() {
            return Ok(());
        }
        let moved = log.counts().filter(|entry| match entry {
            Ok((key, _)) => resolved.contains_key(&key.sender),
            Err(_) => true,
        });
        for (key, count) in moved.collect::<Result<Vec<_>, _>>()? {
            let Some(pod) = resolved.get(&key.sender) else { continue };
            let of_pod = RequestKey { sender: sender_id(Some(pod), "", &[]), ..key };
            let counted = self.known.counted_as(&of_pod);
            let mut merged =
                log.count(&counted)?.unwrap_or(RequestCount { count: 0, ..named(&count, Some(pod)) });
            merged.count = merged.count.saturating_add(count.count);
            merged.first = merged.first.min(count.first);
            merged.last = merged.last.max(count.last);
            log.set_count(&counted, &merged)?;
            log.remove_count(&key)?;
        }
        Ok(())
    }
}

/// Returns the count with the names of the pod.
fn named(count: &RequestCount, pod: Option<&PodRef>) -> RequestCount {
    RequestCount {
        netns_cookie: if pod.is_none() { count.netns_cookie } else { 0 },
        namespace: text_field(pod.map_or("", |pod| &pod.namespace)),
        service_account: text_field(pod.map_or("", |pod| &pod.service_account)),
        label: text_field(pod.and_then(|pod| pod.label.as_deref()).unwrap_or_default()),
        pod: text_field(pod.map_or("", |pod| &pod.pod)),
        ..*count
    }
}

/// Adds requests to the count of a key, or to the count of the sender's other requests.
fn add(
    log: &mut RequestLog,
    known: &mut KnownRequests,
    key: &RequestKey,
    (event, pod): (&RequestEvent, Option<&PodRef>),
    requests: u64,
) -> Result<(), CollectorError> {
    let mut counted = known.counted_as(key);
    let mut before = log.count(&counted)?;
    if before.is_none() && known.scanned.is_none_or(|scanned| scanned.elapsed() >= SCAN_INTERVAL) {
        // Counts may have been evicted or cleared since the last read.
        *known = KnownRequests { scanned: Some(Instant::now()), ..KnownRequests::default() };
        for key in log.keys() {
            known.counted_as(&key?);
        }
        counted = known.counted_as(key);
        before = log.count(&counted)?;
    }
    let now = nanoseconds(event.time);
    let new = RequestCount {
        count: 0,
        first: now,
        last: now,
        netns_cookie: event.sender.netns_cookie,
        namespace: [0; _],
        service_account: [0; _],
        label: [0; _],
        pod: [0; _],
    };
    let mut count = before.unwrap_or_else(|| named(&new, pod));
    count.count = count.count.saturating_add(requests);
    count.last = count.last.max(now);
    count.pod = text_field(pod.map_or("", |pod| &pod.pod));
    Ok(log.set_count(&counted, &count)?)
}

fn key(event: &RequestEvent, pod: Option<&PodRef>) -> RequestKey {
    let unknown = || {
        let mut hasher = DefaultHasher::new();
        event.sender.subjects().next().hash(&mut hasher);
        hasher.finish()
    };
    let sender = pod.map_or_else(unknown, |pod| sender_id(Some(pod), "", &[]));
    RequestKey {
        endpoint: address_key(event.endpoint),
        sender,
        outcome: event.outcome as u8,
        imds_version: event.request.imds_version.unwrap_or_default(),
        reserved: [0; _],
        method: text_field(&event.request.method),
        path: text_field(&counted_path(event)),
    }
}

/// Returns the path under which a request is counted. Another port than that of HTTP precedes it, because no list of requests
/// covers such a request.
fn counted_path(event: &RequestEvent) -> Cow<'_, str> {
    match event.port {
        HTTP_PORT => Cow::Borrowed(&event.request.path),
        port => Cow::Owned(format!(":{port}{}", event.request.path)),
    }
}

/// Returns the key of the sender's requests without a count of their own.
fn other(key: &RequestKey) -> RequestKey {
    RequestKey { method: [0; _], path: [0; _], ..*key }
}

impl KnownRequests {
    /// Returns the key under which a request is counted: its own, or the key of the sender's other requests.
    fn counted_as(&mut self, key: &RequestKey) -> RequestKey {
        if *key == other(key) {
            return *key;
        }
        let requests = self.by_sender.entry(key.sender).or_default();
        let request = self.hasher.hash_one((key.method, key.path));
        if requests.len() < MAX_REQUESTS {
            requests.insert(request);
        }
        if requests.contains(&request) { *key } else { other(key) }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::http_request::tests::refused, *};

    #[test]
    fn number_of_requests_is_limited_for_each_sender() {
        let mut known = KnownRequests::default();
        let of = |sender, number: usize| RequestKey { sender, ..key(&refused(&format!("/{number}")), None) };
        for number in 0..2 * MAX_REQUESTS {
            let counted = known.counted_as(&of(1, number));
            assert_eq!(counted == other(&counted), number >= MAX_REQUESTS, "{number}");
        }
        // Other outcomes of a known request have counts of their own, and other senders their own limit.
        let allowed = RequestKey { outcome: 1, ..of(1, 0) };
        assert_eq!(known.counted_as(&allowed), allowed);
        assert_eq!(known.counted_as(&of(2, 99)), of(2, 99));
        assert_eq!(known.counted_as(&other(&of(3, 0))), other(&of(3, 0)));
    }

    #[test]
    fn other_ports_have_paths_of_their_own() {
        let event = RequestEvent { port: 8080, ..refused("/a") };
        assert_eq!(key(&event, None).path, text_field(":8080/a"));
    }

    #[test]
    fn pods_of_one_application_are_one_sender() {
        let pod = |name: &str, account: &str| PodRef {
            namespace: "n".to_owned(),
            pod: name.to_owned(),
            service_account: account.to_owned(),
            container: None,
            label: None,
            uid: String::new(),
        };
        let event = refused("/a");
        assert_eq!(key(&event, Some(&pod("a", "s"))), key(&event, Some(&pod("b", "s"))));
        assert_ne!(key(&event, Some(&pod("a", "s"))).sender, key(&event, Some(&pod("a", "t"))).sender);
        assert_ne!(key(&event, None).sender, key(&event, Some(&pod("a", "s"))).sender);
    }
}
