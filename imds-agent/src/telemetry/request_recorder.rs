//! Records requests: the last ones, and counts by sender and request, with a bound for each sender.

use std::{
    collections::{HashMap, HashSet},
    hash::{BuildHasher as _, DefaultHasher, Hash as _, Hasher as _, RandomState},
};

use super::{collector::CollectorError, http_request::RequestEvent};
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
}

/// Requests that are counted separately.
#[derive(Debug, Default)]
struct KnownRequests {
    by_sender: HashMap<u64, HashSet<u64>>,
    /// Has random keys: a pod must not find two requests with equal hashes.
    hasher: RandomState,
}

impl RequestRecorder {
    /// Returns a recorder that opens the log with the first request.
    pub(crate) fn new(pins: PinDir, source: RequestSource) -> Self {
        Self { pins, source, open: None, known: KnownRequests::default() }
    }

    /// Records a request. Returns the pod of its sender, if it is known.
    pub(crate) fn record(&mut self, event: &RequestEvent) -> Result<Option<PodRef>, CollectorError> {
        // Without a bpffs, the agent pins no map.
        if !object::is_loaded(&self.pins) {
            return Ok(None);
        }
        let (log, names) = match &mut self.open {
            Some(open) if open.0.is_pinned(&self.pins) => open,
            closed => closed.insert((RequestLog::open_or_create(&self.pins)?, Names::open(&self.pins)?)),
        };
        let pod = event.sender.subjects().find_map(|subject| names.get(subject));
        log.push(self.source, &event.to_record())?;
        let key = key(event, pod.as_ref());
        add(log, &mut self.known, &key, (event, pod.as_ref()), 1)?;
        if event.suppressed > 0 {
            let other = RequestKey { imds_version: 0, ..other(&key) };
            add(log, &mut self.known, &other, (event, pod.as_ref()), event.suppressed)?;
        }
        Ok(pod)
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
    if before.is_none() {
        // Counts may have been evicted or cleared since.
        known.by_sender.clear();
        for key in log.keys() {
            known.counted_as(&key?);
        }
        counted = known.counted_as(key);
        before = log.count(&counted)?;
    }
    let now = nanoseconds(event.time);
    let mut count = before.unwrap_or_else(|| RequestCount {
        count: 0,
        first: now,
        last: now,
        netns_cookie: if pod.is_none() { event.sender.netns_cookie } else { 0 },
        namespace: text_field(pod.map_or("", |pod| &pod.namespace)),
        service_account: text_field(pod.map_or("", |pod| &pod.service_account)),
        label: text_field(pod.and_then(|pod| pod.label.as_deref()).unwrap_or_default()),
        pod: text_field(""),
    });
    count.count = count.count.saturating_add(requests);
    count.last = count.last.max(now);
    count.pod = text_field(pod.map_or("", |pod| &pod.pod));
    Ok(log.set_count(&counted, &count)?)
}

fn key(event: &RequestEvent, pod: Option<&PodRef>) -> RequestKey {
    // `DefaultHasher::new` has fixed keys: all processes of one version compute the same number.
    let mut hasher = DefaultHasher::new();
    match pod {
        Some(pod) => (&pod.namespace, &pod.service_account, &pod.label).hash(&mut hasher),
        None => event.sender.subjects().next().hash(&mut hasher),
    }
    RequestKey {
        endpoint: address_key(event.endpoint),
        sender: hasher.finish(),
        outcome: event.outcome as u8,
        imds_version: event.request.imds_version.unwrap_or_default(),
        reserved: [0; _],
        method: text_field(&event.request.method),
        path: text_field(&event.request.path),
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
