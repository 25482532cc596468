//! Moves events from the ring buffer of the programs to maps that any process can read: the last events, and a record for
//! each denied sender.
//!
//! One process at a time collects events: the running agent or, without one, `imds-agent events` or `imds-agent report`.

use std::{
    cell::RefCell,
    collections::HashMap,
    ffi::OsStr,
    fs::File,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    mem,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
    rc::Rc,
};

use aya::maps::{MapData, MapError, RingBuf};
use imds_ebpf_common::{
    Address, Event, Subject, SubjectKind, Verdict,
    event_log::{DenialKey, DenialRecord},
};
use jiff::Timestamp;
use nix::{
    errno::Errno,
    fcntl::Flock,
    sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags},
};
use thiserror::Error;

use super::{
    audit_rules::AuditRules,
    cgroup_units::CgroupUnits,
    denial::Denial,
    http_request::RequestEvent,
    request_starts::RequestStarts,
    totals::Totals,
    unresolved::{Sharing, Unresolved},
};
use crate::{
    datapath::{
        maps::{counters::Count, denial_records::Denials, pod_names::Names, recent_events::Recent},
        object::{self, ObjectError},
        pin::dir::{PinDir, PinError},
    },
    encode::{bytes_field, field_text, nanoseconds, text_field},
    kube::pod_ref::PodRef,
    node::{
        link::{self, VERIFY_PREFIX},
        pod_cgroups,
    },
    telemetry::{
        event_record::{self, boot_time, wall_time},
        metrics::{self, Denied},
    },
};

#[derive(Debug, Error)]
pub(crate) enum CollectorError {
    #[error(transparent)]
    Object(#[from] ObjectError),
    #[error(transparent)]
    Pin(#[from] PinError),
    #[error("failed to record events")]
    Map(#[from] MapError),
    #[error("failed to wait for events")]
    Wait(#[from] Errno),
}

/// Maximum number of events of one call of [`Collector::collect`]: some milliseconds of work.
const MAX_EVENTS: u32 = 256;
/// Maximum number of starts of requests of one call of [`Collector::collect`].
const MAX_REQUESTS: u32 = 64;

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Collected {
    pub emitted: u64,
    /// Packets and calls beyond the rate limit, which an event reports only as a number.
    pub suppressed: u64,
}

/// Reader of the event ring buffer, and writer of the maps of recorded events and denials.
pub(crate) struct Collector {
    ring: RingBuf<MapData>,
    starts: RequestStarts,
    /// Readable while one of the two ring buffers is.
    readable: Epoll,
    recent: Recent,
    denials: Denials,
    names: Names,
    units: CgroupUnits,
    totals: Rc<RefCell<Totals>>,
    unresolved: Unresolved,
    collected: Collected,
    has_more: bool,
    /// Denials since the last [`Collector::take_denials`]; `None` if no process takes them.
    denials_to_take: Option<Vec<Denial>>,
    /// Requests since the last [`Collector::take_requests`], while denials are kept.
    requests_to_take: Vec<(RequestEvent, Option<PodRef>)>,
    rules: AuditRules,
    _lock: Flock<File>,
}

impl Collector {
    /// Locks the event ring buffer that is pinned in `pins` for this process. Returns `None` if another process holds the
    /// lock.
    pub(crate) fn open(pins: &PinDir) -> Result<Option<Self>, CollectorError> {
        let Some(lock) = pins.try_lock_events()? else { return Ok(None) };
        let (ring, starts) = (object::open_events(pins)?, RequestStarts::open(pins)?);
        let readable = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        for descriptor in [ring.as_fd(), starts.as_fd()] {
            readable.add(descriptor, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
        }
        Ok(Some(Self {
            ring,
            starts,
            readable,
            recent: Recent::open(pins)?,
            denials: Denials::open(pins)?,
            names: Names::open(pins)?,
            units: CgroupUnits::new(),
            totals: Rc::default(),
            unresolved: Unresolved::default(),
            collected: Collected::default(),
            has_more: false,
            denials_to_take: None,
            requests_to_take: Vec::new(),
            rules: AuditRules::open(pins)?,
            _lock: lock,
        }))
    }

    #[must_use]
    pub(crate) fn with_totals(self, totals: Rc<RefCell<Totals>>) -> Self {
        Self { totals, ..self }
    }

    pub(crate) fn recorded(&self) -> Result<Denied, CollectorError> {
        Ok(metrics::sum(self.denials.iter())?)
    }

    /// Keeps denials for [`Collector::take_denials`], or stops that.
    pub(super) fn keep_denials(&mut self, keeps: bool) {
        self.denials_to_take = keeps.then(|| self.denials_to_take.take().unwrap_or_default());
    }

    /// Returns the denials that were collected since the last call, if they are kept.
    pub(super) fn take_denials(&mut self) -> Vec<Denial> {
        self.denials_to_take.as_mut().map(mem::take).unwrap_or_default()
    }

    /// Returns the requests that were collected since the last call, with their pods, if denials are kept.
    pub(super) fn take_requests(&mut self) -> Vec<(RequestEvent, Option<PodRef>)> {
        mem::take(&mut self.requests_to_take)
    }

    /// Returns the pod of a denial's sender, if it is known now.
    pub(super) fn find_pod(&self, denial: &Denial) -> Option<PodRef> {
        event_record::senders(&denial.event)
            .filter(|sender| !is_reused(*sender, &denial.interface))
            .find_map(|sender| self.names.get(sender))
    }

    pub(crate) fn collected(&self) -> Collected {
        self.collected
    }

    /// Reports whether the last [`Collector::collect`] left events in the ring buffer.
    pub(crate) fn has_more(&self) -> bool {
        self.has_more
    }

    /// Reads events up to a limit, because senders can cause events faster than they are read.
    pub(crate) fn collect(&mut self) -> Result<(), CollectorError> {
        let booted = boot_time();
        // An interface can be renamed, but seldom within these milliseconds.
        let mut interfaces = HashMap::new();
        self.has_more = false;
        let mut left = MAX_EVENTS;
        while let Some(event) = self.ring.next().map(|bytes| event_record::decode(&bytes)) {
            let Some(event) = event else { continue };
            self.collected.emitted = self.collected.emitted.saturating_add(1);
            self.collected.suppressed = self.collected.suppressed.saturating_add(event.suppressed);
            self.recent.push(event)?;
            if [Verdict::Denied, Verdict::Audited].into_iter().any(|verdict| event.verdict == verdict as u8) {
                let index = event_record::ingress(&event);
                let interface = interfaces.entry(index).or_insert_with(|| interface_name(index));
                self.record(&event, interface, booted)?;
            }
            left -= 1;
            if left == 0 {
                self.has_more = true;
                break;
            }
        }
        self.collect_requests(booted)
    }

    fn collect_requests(&mut self, booted: Timestamp) -> Result<(), CollectorError> {
        let Self { starts, requests_to_take, denials_to_take, .. } = self;
        let read = starts.record(booted, MAX_REQUESTS, |event, pod| {
            if denials_to_take.is_some() {
                requests_to_take.push((event, pod));
            }
        })?;
        self.has_more |= read == MAX_REQUESTS;
        Ok(())
    }

    /// Adds the packets or calls of an event to the record of their sender.
    fn record(&mut self, event: &Event, interface: &str, booted: Timestamp) -> Result<(), MapError> {
        // `verify` sends these packets to test enforcement.
        if interface.starts_with(VERIFY_PREFIX) {
            return Ok(());
        }
        let pod = event_record::senders(event).find_map(|sender| self.names.get(sender));
        let of_sender = if pod.is_none() || self.denials_to_take.is_some() {
            self.units.unit(event.cgroup)
        } else {
            Rc::default()
        };
        if let Some(denials) = &mut self.denials_to_take {
            denials.push(Denial {
                event: *event,
                time: wall_time(event, booted),
                interface: interface.to_owned(),
                pod: pod.clone(),
                unit: Rc::clone(&of_sender),
                rule: self.rules.find(event),
            });
        }
        let pod = pod.as_ref();
        let unit = if pod.is_none() { of_sender } else { Rc::default() };
        let key = DenialKey {
            address: Address::from_ipv6(event.destination),
            sender: sender_id(pod, interface, &unit),
            hook: event.hook.into(),
            verdict: event.verdict.into(),
        };
        let now = nanoseconds(wall_time(event, booted));
        let earlier = self.denials.get(&key)?;
        let mut record = earlier.unwrap_or_else(|| DenialRecord {
            count: 0,
            bytes: 0,
            first: now,
            last: now,
            namespace: text_field(pod.map_or("", |pod| &pod.namespace)),
            service_account: text_field(pod.map_or("", |pod| &pod.service_account)),
            label: text_field(pod.and_then(|pod| pod.label.as_deref()).unwrap_or_default()),
            pod: text_field(""),
            interface: text_field(interface),
            comm: text_field(""),
            cgroup: bytes_field(&unit),
        });
        let packets = event.suppressed.saturating_add(1);
        record.count = record.count.saturating_add(packets);
        record.bytes = record.bytes.saturating_add(event.bytes);
        record.last = record.last.max(now);
        // Events of packets have no thread name.
        if event.comm != [0; _] {
            record.comm = event.comm;
        }
        record.pod = text_field(pod.map_or("", |pod| &pod.pod));
        self.denials.insert(&key, &record)?;
        if pod.is_none() {
            self.record_unresolved(key, event, &unit, earlier.is_none());
        }
        let namespace = field_text(&record.namespace);
        self.totals.borrow_mut().add(&namespace, &key, Count { packets, bytes: event.bytes });
        Ok(())
    }

    fn record_unresolved(&mut self, key: DenialKey, event: &Event, unit: &[u8], is_new: bool) {
        if self.unresolved.is_full() {
            // The map of records has the same limit: some of these records were evicted or cleared.
            self.unresolved.retain(|key| self.denials.get(key).is_ok_and(|record| record.is_some()));
        }
        let name = Path::new(OsStr::from_bytes(unit)).file_name().and_then(OsStr::to_str);
        let sharing = if name.is_some_and(pod_cgroups::is_pod) {
            Sharing::OnePod
        } else if is_new {
            Sharing::NotedEvents
        } else {
            Sharing::UnknownEvents
        };
        self.unresolved.record(key, event_record::senders(event).collect(), sharing);
    }

    /// Merges each record whose pod became known after the event into the record of the pod. The sums of [`Totals`] do not
    /// change, because they must not decrease.
    pub(crate) fn merge_resolved(&mut self) -> Result<(), CollectorError> {
        self.starts.merge_resolved()?;
        for (key, identity, pod) in self.unresolved.take_resolved(|subject| self.names.get(subject)) {
            let Some(earlier) = self.denials.get(&key)? else { continue };
            if is_reused(identity, &field_text(&earlier.interface)) {
                continue;
            }
            let of_pod = DenialKey { sender: sender_id(Some(&pod), "", &[]), ..key };
            let mut record = self.denials.get(&of_pod)?.unwrap_or(DenialRecord {
                count: 0,
                bytes: 0,
                last: 0,
                namespace: text_field(&pod.namespace),
                service_account: text_field(&pod.service_account),
                label: text_field(pod.label.as_deref().unwrap_or_default()),
                cgroup: text_field(""),
                ..earlier
            });
            record.count = record.count.saturating_add(earlier.count);
            record.bytes = record.bytes.saturating_add(earlier.bytes);
            record.first = record.first.min(earlier.first);
            if earlier.last >= record.last {
                record.last = earlier.last;
                record.pod = text_field(&pod.pod);
            }
            self.denials.replace((&key, &earlier), (&of_pod, &record))?;
            let count = Count { packets: earlier.count, bytes: earlier.bytes };
            self.totals.borrow_mut().record_merge(&pod.namespace, &key, count);
        }
        Ok(())
    }
}

impl AsFd for Collector {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.readable.0.as_fd()
    }
}

impl AsRawFd for Collector {
    fn as_raw_fd(&self) -> RawFd {
        self.readable.0.as_raw_fd()
    }
}

/// Returns the name of the interface through which a packet entered the node. Empty for calls, and for deleted interfaces,
/// because each of their indices would be another sender.
fn interface_name(index: u32) -> String {
    if index == 0 { String::new() } else { link::name_of(index).unwrap_or_default() }
}

/// Reports whether the index of the interface with this name now belongs to another interface.
fn is_reused(identity: Subject, interface: &str) -> bool {
    let is_interface = SubjectKind::from_u64(identity.kind) == Some(SubjectKind::Interface);
    let name = u32::try_from(identity.id).map(interface_name).unwrap_or_default();
    is_interface && name != interface
}

/// Returns the number under which the denials of a sender are counted together.
///
/// The number depends on nothing that a sender chooses freely, like names of threads or of cgroups below its own. Otherwise
/// one process could fill the table with records and evict those of other senders.
pub(super) fn sender_id(pod: Option<&PodRef>, interface: &str, unit: &[u8]) -> u64 {
    // `DefaultHasher::new` has fixed keys: all processes of one version compute the same number.
    let mut hasher = DefaultHasher::new();
    match pod {
        Some(pod) => (&pod.namespace, &pod.service_account, &pod.label).hash(&mut hasher),
        None => (interface, unit).hash(&mut hasher),
    }
    hasher.finish()
}
