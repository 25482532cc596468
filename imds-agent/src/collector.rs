//! Takes what the programs tell from the ring buffer, into maps from which all can read: the last events as they are, and
//! who was denied what how often.
//!
//! One process at a time does so, the running agent or else whoever follows events.

use std::{
    fs::File,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
        unix::ffi::OsStringExt as _,
    },
};

use aya::maps::{MapData, MapError, RingBuf};
use imds_ebpf_common::{
    Address, Event, Verdict,
    ledger::{DenialKey, DenialRecord},
};
use jiff::Timestamp;
use nix::fcntl::Flock;
use thiserror::Error;

use crate::{
    datapath::{
        config::{nanoseconds, padded, padded_bytes},
        denials::Denials,
        object::{self, ObjectError},
        pins::{PinDir, PinError},
        pods::Names,
        recent::Recent,
    },
    events::{self, boot_time, wall_time},
    node::{cgroup, links},
    pods::Identity,
    verify,
};

/// Why events can't be collected.
#[derive(Debug, Error)]
pub enum CollectorError {
    /// A map can't be opened.
    #[error(transparent)]
    Object(#[from] ObjectError),
    /// The pin directory can't be locked.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// A map can't be read or written.
    #[error("can't keep what the programs tell")]
    Map(#[from] MapError),
}

/// Most events that are taken at a time: some milliseconds' work.
const MOST_AT_ONCE: u32 = 256;

/// How much was collected.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Collected {
    /// Events that the programs told of.
    pub told: u64,
    /// Packets and calls of which they told by their number alone.
    pub suppressed: u64,
}

/// The reader of the ring buffer.
pub struct Collector {
    ring: RingBuf<MapData>,
    recent: Recent,
    denials: Denials,
    names: Names,
    collected: Collected,
    /// Whether there was more than was taken last.
    has_more: bool,
    _claim: Flock<File>,
}

impl Collector {
    /// Takes the events of the programs that are pinned in `pins` for this process; `None` where another one has them.
    pub fn open(pins: &PinDir) -> Result<Option<Self>, CollectorError> {
        let Some(claim) = pins.try_claim_events()? else { return Ok(None) };
        Ok(Some(Self {
            ring: object::open_events(pins)?,
            recent: Recent::open(pins)?,
            denials: Denials::open(pins)?,
            names: Names::open(pins)?,
            collected: Collected::default(),
            has_more: false,
            _claim: claim,
        }))
    }

    /// What was taken so far.
    #[must_use]
    pub fn collected(&self) -> Collected {
        self.collected
    }

    /// Whether there was more than [`Collector::collect`] took.
    #[must_use]
    pub fn has_more(&self) -> bool {
        self.has_more
    }

    /// Takes what there is, but not more than may be done at a time: whoever sends can make events faster than they are
    /// taken.
    pub fn collect(&mut self) -> Result<(), CollectorError> {
        let booted = boot_time();
        self.has_more = false;
        let mut left = MOST_AT_ONCE;
        while let Some(bytes) = self.ring.next() {
            let Some(event) = events::decode(&bytes) else { continue };
            drop(bytes);
            self.collected.told = self.collected.told.saturating_add(1);
            self.collected.suppressed = self.collected.suppressed.saturating_add(event.suppressed);
            self.recent.push(event)?;
            if [Verdict::Deny, Verdict::Audit].into_iter().any(|verdict| event.verdict == verdict as u8) {
                let pod = events::senders(&event).find_map(|sender| self.names.get(sender));
                note(&mut self.denials, &event, pod.as_ref(), booted)?;
            }
            left -= 1;
            if left == 0 {
                self.has_more = true;
                break;
            }
        }
        Ok(())
    }
}

impl AsFd for Collector {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }
}

impl AsRawFd for Collector {
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

/// Counts an event to its sender.
fn note(
    denials: &mut Denials,
    event: &Event,
    pod: Option<&Identity>,
    booted: Timestamp,
) -> Result<(), MapError> {
    let interface = match events::ingress(event) {
        0 => String::new(),
        index => links::name_of(index).unwrap_or_else(|| format!("#{index}")),
    };
    if interface.starts_with(verify::PREFIX) {
        // The proof that pods are denied is none.
        return Ok(());
    }
    let key = DenialKey {
        address: Address::from_ipv6(event.destination),
        sender: sender(pod, event, &interface),
        hook: event.hook.into(),
        verdict: event.verdict.into(),
    };
    let now = nanoseconds(wall_time(event, booted));
    let before = denials.get(&key)?;
    let mut record = before.unwrap_or_else(|| DenialRecord {
        count: 0,
        bytes: 0,
        first: now,
        last: now,
        namespace: padded(pod.map_or("", |pod| &pod.namespace)),
        service_account: padded(pod.map_or("", |pod| &pod.service_account)),
        label: padded(pod.and_then(|pod| pod.label.as_deref()).unwrap_or_default()),
        pod: padded(""),
        interface: padded(&interface),
        comm: padded(""),
        cgroup: padded_bytes(&if pod.is_none() { cgroup_path(event.cgroup) } else { Vec::new() }),
    });
    record.count = record.count.saturating_add(event.suppressed).saturating_add(1);
    record.bytes = record.bytes.saturating_add(event.bytes);
    record.last = record.last.max(now);
    // A packet of the same cgroup names no thread.
    if event.comm != [0; _] {
        record.comm = event.comm;
    }
    record.pod = padded(pod.map_or("", |pod| &pod.pod));
    denials.put(&key, &record)
}

/// Returns the number under which the denials of a sender are counted together.
///
/// A sender chooses the names of its threads freely, so that they are no part of the number: else one process could fill the
/// table with records and evict those of other senders.
fn sender(pod: Option<&Identity>, event: &Event, interface: &str) -> u64 {
    // Its keys are the same for all processes of one version; what another one counted goes on under another number.
    let mut hasher = DefaultHasher::new();
    match pod {
        Some(pod) => (&pod.namespace, &pod.service_account, &pod.label).hash(&mut hasher),
        None => (interface, event.cgroup).hash(&mut hasher),
    }
    hasher.finish()
}

/// Below the root of the hierarchy.
fn cgroup_path(id: u64) -> Vec<u8> {
    let path = if id == 0 { None } else { cgroup::path_of(id).ok().flatten() };
    let root = cgroup::root().ok().flatten();
    let below = path.zip(root).and_then(|(path, root)| path.strip_prefix(root).ok().map(ToOwned::to_owned));
    below.map(|path| path.into_os_string().into_vec()).unwrap_or_default()
}
