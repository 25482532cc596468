//! Aggregation and rate limits of the Events about pods, without any I/O.

use std::{
    collections::{HashMap, VecDeque},
    net::IpAddr,
    time::{Duration, Instant},
};

use imds_ebpf_common::{Address, Verdict};
use jiff::Timestamp;

use crate::{
    encode::{hook_name, ip_address, nonempty_text},
    kube::{EventSeries, pod_ref::PodRef},
    telemetry::denial::Denial,
};

/// Largest number of series in memory. Denials of further series are dropped.
const MAX_SERIES: usize = 512;
/// Largest number of series of one pod.
const MAX_POD_SERIES: usize = 8;
/// Delay of the next attempt for a series after an error of the API server.
const RETRY: Duration = Duration::from_secs(30);
/// Delay of the first Event of a series, which collects the retries of a client.
const FIRST_DELAY: Duration = Duration::from_secs(1);
/// Delay of the first update of a series. Doubles with each update.
const FIRST_UPDATE: Duration = Duration::from_mins(1);
/// Upper bound of the delay of an update.
const MAX_UPDATE: Duration = Duration::from_mins(8);
/// Time without a denial after which a series ends: the next denial creates another Event. As in client-go.
const MAX_IDLE: Duration = Duration::from_mins(6);
/// Period of the limits below.
const PERIOD: Duration = Duration::from_mins(1);
/// Requests to the API server per period for all pods; two more are left for Events about the node. The limit for each pod
/// is one.
const MAX_WRITES: usize = 8;

/// Denied or audited requests of one sender, as an event of the BPF programs reports them.
#[derive(Clone, Debug)]
pub(crate) struct DenialNotice {
    pub request: DeniedRequest,
    /// Name of the thread whose call was denied; `None` for packets.
    pub comm: Option<String>,
    /// Number of packets or calls.
    pub count: u64,
    pub time: Timestamp,
}

impl DenialNotice {
    /// Returns the parts of a denial that an Event tells.
    pub(super) fn new(denial: &Denial) -> Self {
        let event = &denial.event;
        let request = DeniedRequest {
            hook: hook_name(event.hook.into()),
            is_audited: event.verdict == Verdict::Audited as u8,
            is_rule_audited: denial.rule.is_some(),
            address: ip_address(Address::from_ipv6(event.destination)),
        };
        let count = event.suppressed.saturating_add(1);
        Self { request, comm: nonempty_text(&event.comm), count, time: denial.time }
    }
}

/// Requests that count together.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub(crate) struct DeniedRequest {
    pub hook: &'static str,
    /// True for requests that audit mode or a rule allowed.
    pub is_audited: bool,
    /// True if an exemption rule audits the requests, and not the mode.
    pub is_rule_audited: bool,
    pub address: IpAddr,
}

/// Key of a series: pod UID and request.
pub(super) type SeriesKey = (String, DeniedRequest);

/// Event to create or to update.
#[derive(Clone, Debug)]
pub(super) struct PendingWrite {
    pub key: SeriesKey,
    /// Name of the Event to update; `None` to create one.
    pub name: Option<String>,
    pub pod: PodRef,
    pub comm: Option<String>,
    pub first: Timestamp,
    pub series: EventSeries,
}

/// Series of denials, and the times of the last writes.
#[derive(Debug, Default)]
pub(super) struct EventQueue {
    series: HashMap<SeriesKey, Series>,
    writes: VecDeque<Instant>,
    pod_writes: HashMap<String, Instant>,
    /// Number of denials that caused no Event.
    pub dropped: u64,
}

#[derive(Debug)]
struct Series {
    pod: PodRef,
    comm: Option<String>,
    first: Timestamp,
    last: Timestamp,
    count: u64,
    /// Value of `count` in the last write.
    written: u64,
    name: Option<String>,
    due: Instant,
    delay: Duration,
    last_seen: Instant,
}

impl Series {
    fn is_ended(&self, now: Instant) -> bool {
        self.written == self.count && self.last_seen + MAX_IDLE < now
    }
}

impl EventQueue {
    pub(super) fn record(&mut self, pod: PodRef, notice: DenialNotice, now: Instant) {
        let DenialNotice { request, comm, count, time } = notice;
        let key = (pod.uid.clone(), request);
        if self.series.get(&key).is_none_or(|series| series.is_ended(now)) {
            if self.series.len() >= MAX_SERIES {
                self.expire(now);
            }
            let of_pod = self.series.keys().filter(|(uid, _)| *uid == key.0).count();
            if self.series.len() >= MAX_SERIES || of_pod >= MAX_POD_SERIES {
                self.dropped = self.dropped.saturating_add(count);
                return;
            }
            let (due, delay) = (now + FIRST_DELAY, FIRST_UPDATE);
            let (first, last) = (time, time);
            let new =
                Series { pod, comm, first, last, count, written: 0, name: None, due, delay, last_seen: now };
            self.series.insert(key, new);
        } else if let Some(series) = self.series.get_mut(&key) {
            series.count = series.count.saturating_add(count);
            series.last = series.last.max(time);
            series.last_seen = now;
            series.comm = series.comm.take().or(comm);
        }
    }

    /// Returns the next write that the limits allow now, and counts it against them. New series come first.
    pub(super) fn take_due(&mut self, now: Instant) -> Option<PendingWrite> {
        self.expire(now);
        if self.writes.len() >= MAX_WRITES {
            return None;
        }
        let is_due = |(key, series): &(&SeriesKey, &Series)| {
            series.count > series.written && series.due <= now && !self.pod_writes.contains_key(&key.0)
        };
        let by_age = |(_, series): &(&SeriesKey, &Series)| (series.name.is_some(), series.due);
        let (key, series) = self.series.iter().filter(is_due).min_by_key(by_age)?;
        let write = PendingWrite {
            key: key.clone(),
            name: series.name.clone(),
            pod: series.pod.clone(),
            comm: series.comm.clone(),
            first: series.first,
            series: EventSeries { count: series.count, last: series.last },
        };
        self.writes.push_back(now);
        self.pod_writes.insert(write.key.0.clone(), now);
        Some(write)
    }

    /// Returns the time at which [`EventQueue::take_due`] returns the next write; `None` without a pending one.
    pub(super) fn next_due(&self) -> Option<Instant> {
        let pending = self.series.iter().filter(|(_, series)| series.count > series.written);
        let of_series = pending
            .map(|((uid, _), series)| {
                let after_pod = self.pod_writes.get(uid).map_or(series.due, |&written| written + PERIOD);
                series.due.max(after_pod)
            })
            .min()?;
        let is_full = self.writes.len() >= MAX_WRITES;
        let after_others = self.writes.front().filter(|_| is_full).map(|&first| first + PERIOD);
        Some(after_others.map_or(of_series, |after| of_series.max(after)))
    }

    /// Records that the API server has stored `write` as the Event `name`.
    pub(super) fn on_written(&mut self, write: &PendingWrite, name: String, now: Instant) {
        let Some(series) = self.series.get_mut(&write.key) else { return };
        series.written = write.series.count;
        series.name = Some(name);
        series.due = now + series.delay;
        series.delay = (series.delay * 2).min(MAX_UPDATE);
    }

    /// Records that the Event to update has expired: the observations since the last write become another Event.
    pub(super) fn on_expired(&mut self, write: &PendingWrite) {
        let Some(series) = self.series.get_mut(&write.key) else { return };
        series.name = None;
        series.first = series.last;
        series.count = series.count.saturating_sub(series.written).max(1);
        series.written = 0;
    }

    /// Records that a write failed and that another attempt can succeed. The limit for its pod does not count it.
    pub(super) fn retry(&mut self, write: &PendingWrite) {
        self.pod_writes.remove(&write.key.0);
    }

    /// Postpones the next attempt after an error that concerns only this write: other series come first.
    pub(super) fn postpone(&mut self, write: &PendingWrite, now: Instant) {
        self.retry(write);
        if let Some(series) = self.series.get_mut(&write.key) {
            series.due = now + RETRY;
        }
    }

    /// Ends the series of a write that the API server will never accept.
    pub(super) fn on_rejected(&mut self, write: &PendingWrite) {
        if let Some(series) = self.series.remove(&write.key) {
            self.dropped = self.dropped.saturating_add(series.count.saturating_sub(series.written));
        }
    }

    /// Removes ended series, unwritten ones that nothing has added to for too long, and writes that no limit counts any more.
    fn expire(&mut self, now: Instant) {
        let dropped = &mut self.dropped;
        self.series.retain(|_, series| {
            let is_stale = series.last_seen + MAX_UPDATE + MAX_IDLE < now;
            if is_stale {
                *dropped = dropped.saturating_add(series.count.saturating_sub(series.written));
            }
            !is_stale && !series.is_ended(now)
        });
        while self.writes.pop_front_if(|written| *written + PERIOD <= now).is_some() {}
        self.pod_writes.retain(|_, written| *written + PERIOD > now);
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn record(queue: &mut EventQueue, uid: &str, hook: &'static str, now: Instant) {
        let pod = PodRef {
            namespace: "web".into(),
            pod: format!("pod-{uid}"),
            service_account: "api".into(),
            container: None,
            label: None,
            uid: uid.into(),
        };
        let address = Ipv4Addr::new(169, 254, 169, 254).into();
        let request = DeniedRequest { hook, is_audited: false, is_rule_audited: false, address };
        let notice = DenialNotice { request, comm: None, count: 1, time: Timestamp::UNIX_EPOCH };
        queue.record(pod, notice, now);
    }

    /// Takes and confirms all writes that are due, and returns their names and counts.
    fn write_all(queue: &mut EventQueue, now: Instant) -> Vec<(Option<String>, u64)> {
        let mut written = Vec::new();
        while let Some(write) = queue.take_due(now) {
            queue.on_written(&write, format!("event-{}", write.key.0), now);
            written.push((write.name, write.series.count));
        }
        written
    }

    #[test]
    fn retries_are_one_event() {
        let (mut queue, start) = (EventQueue::default(), Instant::now());
        assert_eq!(queue.next_due(), None);
        for _ in 0..5 {
            record(&mut queue, "a", "socket", start);
        }
        assert!(queue.take_due(start).is_none());
        assert_eq!(queue.next_due(), Some(start + FIRST_DELAY));
        assert_eq!(write_all(&mut queue, start + FIRST_DELAY), [(None, 5)]);
        assert_eq!(queue.next_due(), None);
    }

    #[test]
    fn updates_become_rarer() {
        let (mut queue, start) = (EventQueue::default(), Instant::now());
        let mut writes = Vec::new();
        for second in 0..3600 {
            let now = start + Duration::from_secs(second);
            record(&mut queue, "a", "socket", now);
            writes.extend(write_all(&mut queue, now).into_iter().map(|(name, _)| (second, name.is_some())));
        }
        let seconds: Vec<_> = writes.iter().map(|(second, _)| *second).collect();
        assert_eq!(seconds, [1, 61, 181, 421, 901, 1381, 1861, 2341, 2821, 3301]);
        assert_eq!(writes.iter().filter(|(_, is_update)| !is_update).count(), 1);
    }

    #[test]
    fn writes_are_limited_per_pod_and_node() {
        let (mut queue, start) = (EventQueue::default(), Instant::now());
        for pod in 0..1000 {
            for hook in ["socket", "from_pod"] {
                record(&mut queue, &pod.to_string(), hook, start);
            }
        }
        let mut times: Vec<u64> = Vec::new();
        for second in 1..600 {
            let written = write_all(&mut queue, start + Duration::from_secs(second));
            times.extend(written.iter().map(|_| second));
        }
        for &time in &times {
            let in_period = times.iter().filter(|&&other| (time..time + 60).contains(&other)).count();
            assert!(in_period <= MAX_WRITES, "{in_period} in the minute after {time}");
        }
        assert_eq!(times.len(), 10 * MAX_WRITES);
        assert_eq!(queue.dropped, 2000 - 512);

        let (mut queue, start) = (EventQueue::default(), Instant::now());
        for hook in ["socket", "from_pod"] {
            record(&mut queue, "a", hook, start);
        }
        let later = start + FIRST_DELAY;
        assert_eq!(write_all(&mut queue, later).len(), 1);
        assert_eq!(queue.next_due(), Some(later + PERIOD));
        assert_eq!(write_all(&mut queue, later + PERIOD).len(), 1);
    }

    #[test]
    fn series_ends_without_denials() {
        let (mut queue, start) = (EventQueue::default(), Instant::now());
        record(&mut queue, "a", "socket", start);
        write_all(&mut queue, start + FIRST_DELAY);
        let later = start + MAX_IDLE + Duration::from_secs(1);
        record(&mut queue, "a", "socket", later);
        assert_eq!(write_all(&mut queue, later + FIRST_DELAY), [(None, 1)]);
    }

    #[test]
    fn expired_event_is_created_again() {
        let (mut queue, start) = (EventQueue::default(), Instant::now());
        record(&mut queue, "a", "socket", start);
        write_all(&mut queue, start + FIRST_DELAY);
        record(&mut queue, "a", "socket", start + FIRST_UPDATE);
        let update = start + FIRST_UPDATE * 2;
        let write = queue.take_due(update).unwrap();
        assert_eq!(write.name.as_deref(), Some("event-a"));
        queue.on_expired(&write);
        assert_eq!(write_all(&mut queue, update + PERIOD), [(None, 1)]);
    }

    #[test]
    fn rejected_series_counts_as_dropped() {
        let (mut queue, start) = (EventQueue::default(), Instant::now());
        record(&mut queue, "a", "socket", start);
        let write = queue.take_due(start + FIRST_DELAY).unwrap();
        queue.on_rejected(&write);
        assert_eq!((queue.next_due(), queue.dropped), (None, 1));
    }

    #[test]
    fn failing_series_does_not_stop_others() {
        let (mut queue, start) = (EventQueue::default(), Instant::now());
        record(&mut queue, "bad", "socket", start);
        record(&mut queue, "good", "socket", start + FIRST_DELAY);
        let now = start + FIRST_DELAY * 2;
        let write = queue.take_due(now).unwrap();
        assert_eq!(write.key.0, "bad");
        queue.postpone(&write, now);
        assert_eq!(write_all(&mut queue, now), [(None, 1)]);
        assert_eq!(queue.next_due(), Some(now + RETRY));
        assert_eq!(write_all(&mut queue, now + RETRY), [(None, 1)]);
    }

    #[test]
    fn memory_is_bounded_without_a_server() {
        let (mut queue, start) = (EventQueue::default(), Instant::now());
        for pod in 0..10_000_u32 {
            record(&mut queue, &pod.to_string(), "socket", start);
        }
        assert_eq!(queue.series.len(), MAX_SERIES);
        let later = start + Duration::from_mins(20);
        record(&mut queue, "new", "socket", later);
        assert_eq!((queue.series.len(), queue.dropped), (1, 10_000));
    }
}
