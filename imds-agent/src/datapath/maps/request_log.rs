//! HTTP requests of pods, in pinned maps: the last ones, and counts by sender and request. They are for user space only.
//!
//! The BPF object does not contain these maps: the agent creates them with the first request, because most nodes have none.

use aya::maps::{Array, HashMap, Map, MapData, MapError, MapInfo};
use aya_obj::generated::bpf_map_type;
use imds_ebpf_common::{
    Address,
    maps::{LABEL_LEN, LONG_NAME_LEN, NAME_LEN},
};

use super::denial_records::evicted;
use crate::datapath::{
    maps::pinned_maps::is_layout_of,
    object::{self, ObjectError},
    pin::dir::{PinDir, replace_pin},
};

/// Array of [`Slot`]s: a ring for each source.
const MAP_REQUESTS: &str = "imds_requests";
/// Array of `u64`: for each source, the numbers of the last request and of the last one that a client has printed.
const MAP_REQUESTS_IDX: &str = "imds_req_idx";
/// Hash of [`RequestKey`] to [`RequestCount`].
const MAP_REQUEST_COUNTS: &str = "imds_req_counts";
/// Names of the maps, which are pinned beside those of the object.
pub(crate) const REQUEST_MAPS: [&str; 3] = [MAP_REQUESTS, MAP_REQUESTS_IDX, MAP_REQUEST_COUNTS];

/// Number of requests of one source that the log keeps.
const RECENT: u64 = 512;
/// Largest number of request counts of all senders.
const COUNTS: usize = 4096;
/// Longest method and path in bytes, as the broker reports them.
pub(crate) const METHOD_LEN: usize = 16;
pub(crate) const PATH_LEN: usize = 256;
const REASON_LEN: usize = 256;
/// `BPF_F_NO_PREALLOC`: memory is allocated with the entries.
const NO_PREALLOC: u32 = 1;

/// Source of requests. Each has one writer at a time, so that the rings need no lock.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum RequestSource {
    /// Requests that the broker answered. The running agent writes them.
    Broker,
    /// Requests that the programs saw. The process that collects events writes them.
    Programs,
}

impl RequestSource {
    /// All sources, in the order of their rings.
    pub(crate) const ALL: [Self; 2] = [Self::Broker, Self::Programs];

    const fn write_pos(self) -> u32 {
        2 * self as u32
    }

    const fn read_pos(self) -> u32 {
        2 * self as u32 + 1
    }

    #[expect(clippy::cast_possible_truncation, reason = "the remainder is less than the number of slots")]
    const fn slot(self, number: u64) -> u32 {
        (self as u64 * RECENT + number % RECENT) as u32
    }
}

/// A request. Text is padded with zero bytes, and 0 stands for unknown numbers.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct RequestRecord {
    /// Nanoseconds since the epoch.
    pub(crate) time: u64,
    /// Further requests with the same outcome that were suppressed before this one.
    pub(crate) suppressed: u64,
    /// Identities of the sender.
    pub(crate) netns_cookie: u64,
    pub(crate) cgroup: u64,
    pub(crate) ifindex: u32,
    /// Number of the hook that saw the request; 0 for the broker.
    pub(crate) hook: u32,
    pub(crate) endpoint: Address,
    /// Number of further rules that match the sender.
    pub(crate) other_rules: u32,
    pub(crate) port: u16,
    /// HTTP status.
    pub(crate) status: u16,
    /// Number of the outcome.
    pub(crate) outcome: u8,
    pub(crate) imds_version: u8,
    /// Explicit padding, always written as 0.
    pub(crate) reserved: [u8; 6],
    /// Name of the first rule that matches the sender.
    pub(crate) rule: [u8; NAME_LEN],
    pub(crate) method: [u8; METHOD_LEN],
    pub(crate) path: [u8; PATH_LEN],
    pub(crate) reason: [u8; REASON_LEN],
}

/// Entry of a ring. While its two numbers differ, the entry is being written.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Slot {
    number: u64,
    record: RequestRecord,
    number_again: u64,
}

/// Key of the counts. Pods of one namespace with equal service account and equal identifying label are one sender.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) struct RequestKey {
    pub(crate) endpoint: Address,
    /// Hash of the sender's identity.
    pub(crate) sender: u64,
    /// Number of the outcome.
    pub(crate) outcome: u8,
    pub(crate) imds_version: u8,
    /// Explicit padding, always written as 0.
    pub(crate) reserved: [u8; 6],
    /// Method and path. Both are empty for all requests without a count of their own.
    pub(crate) method: [u8; METHOD_LEN],
    pub(crate) path: [u8; PATH_LEN],
}

/// Count of one request of a sender. Text is padded with zero bytes; times are nanoseconds since the epoch.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct RequestCount {
    pub(crate) count: u64,
    pub(crate) first: u64,
    pub(crate) last: u64,
    /// Cookie of the sender's network namespace; 0 if the pod is known.
    pub(crate) netns_cookie: u64,
    /// Namespace of the pod; empty if the pod is unknown.
    pub(crate) namespace: [u8; NAME_LEN],
    pub(crate) service_account: [u8; LONG_NAME_LEN],
    pub(crate) label: [u8; LABEL_LEN],
    /// Name of the pod whose request was the last.
    pub(crate) pod: [u8; LONG_NAME_LEN],
}

const _: () = assert!(size_of::<RequestRecord>() == 72 + 64 + 16 + 256 + 256);
const _: () = assert!(size_of::<RequestKey>() == 32 + 16 + 256);
const _: () = assert!(size_of::<RequestCount>() == 32 + 64 + 256 + 192 + 256);

// SAFETY: repr(C), integers only, no padding: every bit pattern is a value.
unsafe impl aya::Pod for Slot {}
// SAFETY: repr(C), integers only, no padding: every bit pattern is a value.
unsafe impl aya::Pod for RequestKey {}
// SAFETY: repr(C), integers only, no padding: every bit pattern is a value.
unsafe impl aya::Pod for RequestCount {}

/// Maps of the requests.
pub(crate) struct RequestLog {
    ids: [u32; 3],
    requests: Array<MapData, Slot>,
    positions: Array<MapData, u64>,
    counts: HashMap<MapData, RequestKey, RequestCount>,
}

impl RequestLog {
    /// Opens the pinned maps. Returns `None` if no request was recorded yet, and for maps of another version.
    pub(crate) fn open(pins: &PinDir) -> Result<Option<Self>, ObjectError> {
        let mut maps = REQUEST_MAPS.into_iter().zip(layouts());
        if !maps.all(|(name, layout)| is_layout_of(&pins.map(name), layout)) {
            return Ok(None);
        }
        Self::new(|name, _| {
            MapData::from_pin(pins.map(name)).map_err(|source| ObjectError::Map { name, source })
        })
        .map(Some)
    }

    /// Opens the pinned maps, and creates those that do not exist or have the layout of another version.
    pub(crate) fn open_or_create(pins: &PinDir) -> Result<Self, ObjectError> {
        Self::new(|name, layout| {
            let path = pins.map(name);
            if is_layout_of(&path, layout) {
                return MapData::from_pin(path).map_err(|source| ObjectError::Map { name, source });
            }
            let [map_type, key_size, value_size, entries, flags] = layout;
            let definition = aya_obj::Map::new_from_params(map_type, key_size, value_size, entries, flags);
            let map = MapData::create(definition, name, None)
                .map_err(|source| ObjectError::Map { name, source })?;
            replace_pin(map.fd(), &path)?;
            Ok(map)
        })
    }

    fn new(
        open: impl Fn(&'static str, [u32; 5]) -> Result<MapData, ObjectError>,
    ) -> Result<Self, ObjectError> {
        let mut ids = [0; 3];
        let mut maps = Vec::new();
        for ((name, layout), id) in REQUEST_MAPS.into_iter().zip(layouts()).zip(&mut ids) {
            let map = open(name, layout)?;
            *id = map.info().map_err(|source| ObjectError::Map { name, source })?.id();
            maps.push(map);
        }
        let mut maps = maps.into_iter();
        let mut next = || maps.next().ok_or(ObjectError::Missing(MAP_REQUESTS));
        let failed = |name| move |source| ObjectError::Map { name, source };
        Ok(Self {
            ids,
            requests: Map::Array(next()?).try_into().map_err(failed(MAP_REQUESTS))?,
            positions: Map::Array(next()?).try_into().map_err(failed(MAP_REQUESTS_IDX))?,
            counts: Map::HashMap(next()?).try_into().map_err(failed(MAP_REQUEST_COUNTS))?,
        })
    }

    /// Reports whether the pins are those of these maps.
    pub(crate) fn is_pinned(&self, pins: &PinDir) -> bool {
        let is_pin = |(name, id)| MapInfo::from_pin(pins.map(name)).is_ok_and(|pinned| pinned.id() == id);
        REQUEST_MAPS.into_iter().zip(self.ids).all(is_pin)
    }

    /// Returns the number of the last request of a source; 0 before the first.
    pub(crate) fn last(&self, source: RequestSource) -> Result<u64, MapError> {
        self.positions.get(&source.write_pos(), 0)
    }

    /// Returns the number of the last request that a client has printed.
    pub(crate) fn last_printed(&self, source: RequestSource) -> Result<u64, MapError> {
        self.positions.get(&source.read_pos(), 0)
    }

    /// Records that a client has printed all requests up to number `shown`.
    pub(crate) fn set_last_printed(&mut self, source: RequestSource, shown: u64) -> Result<(), MapError> {
        let is_later = shown > self.last_printed(source)?;
        if is_later { self.positions.set(source.read_pos(), shown, 0) } else { Ok(()) }
    }

    /// Adds a request. Only one process at a time may call this for a source.
    pub(crate) fn push(&mut self, source: RequestSource, record: &RequestRecord) -> Result<(), MapError> {
        let number = self.last(source)?.saturating_add(1);
        self.requests.set(source.slot(number), Slot { number, record: *record, number_again: number }, 0)?;
        self.positions.set(source.write_pos(), number, 0)
    }

    /// Returns the requests after number `after` that are not overwritten yet, and the number of the last request.
    pub(crate) fn since(
        &self,
        source: RequestSource,
        after: u64,
    ) -> Result<(Vec<RequestRecord>, u64), MapError> {
        let last = self.last(source)?;
        let first = after.max(last.saturating_sub(RECENT)).saturating_add(1);
        let mut records = Vec::new();
        for number in first..=last {
            let slot = self.requests.get(&source.slot(number), 0)?;
            // Skips entries that a newer request has overwritten in the meantime.
            if slot.number == number && slot.number_again == number {
                records.push(slot.record);
            }
        }
        Ok((records, last))
    }

    /// Iterates over the keys of all counts.
    pub(crate) fn keys(&self) -> impl Iterator<Item = Result<RequestKey, MapError>> {
        object::present(self.counts.keys())
    }

    /// Iterates over all counts.
    pub(crate) fn counts(&self) -> impl Iterator<Item = Result<(RequestKey, RequestCount), MapError>> {
        object::present(self.counts.iter())
    }

    pub(crate) fn count(&self, key: &RequestKey) -> Result<Option<RequestCount>, MapError> {
        match self.counts.get(key, 0) {
            Ok(count) => Ok(Some(count)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Writes a count. If the map is full, evicts old counts, first those of namespaces with many counts.
    pub(crate) fn set_count(&mut self, key: &RequestKey, count: &RequestCount) -> Result<(), MapError> {
        match self.counts.insert(key, count, 0) {
            Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::E2BIG) => {
                self.evict_counts()?;
                self.counts.insert(key, count, 0)
            }
            inserted => inserted,
        }
    }

    pub(crate) fn remove_count(&mut self, key: &RequestKey) -> Result<(), MapError> {
        object::removed(self.counts.remove(key))
    }

    /// Removes all counts.
    pub(crate) fn clear_counts(&mut self) -> Result<(), MapError> {
        let keys: Vec<_> = self.keys().collect::<Result<_, _>>()?;
        keys.iter().try_for_each(|key| object::removed(self.counts.remove(key)))
    }

    /// Evicts an eighth of the counts at once, because the choice reads all of them.
    fn evict_counts(&mut self) -> Result<(), MapError> {
        let owner = |count: &RequestCount| (count.namespace, count.netns_cookie);
        let entry = |entry: Result<(RequestKey, RequestCount), _>| {
            entry.map(|(key, count)| (owner(&count), count.last, key))
        };
        let all = self.counts().map(entry).collect::<Result<Vec<_>, MapError>>()?;
        evicted(all, COUNTS / 8).iter().try_for_each(|key| object::removed(self.counts.remove(key)))
    }
}

/// Returns type, key size, value size, entries and flags of the maps, in the order of [`REQUEST_MAPS`].
#[expect(clippy::cast_possible_truncation, reason = "sizes and numbers of entries are small")]
const fn layouts() -> [[u32; 5]; 3] {
    const SOURCES: u32 = RequestSource::ALL.len() as u32;
    const ARRAY: u32 = bpf_map_type::BPF_MAP_TYPE_ARRAY as u32;
    const HASH: u32 = bpf_map_type::BPF_MAP_TYPE_HASH as u32;
    [
        [ARRAY, 4, size_of::<Slot>() as u32, SOURCES * RECENT as u32, 0],
        [ARRAY, 4, size_of::<u64>() as u32, SOURCES * 2, 0],
        [HASH, size_of::<RequestKey>() as u32, size_of::<RequestCount>() as u32, COUNTS as u32, NO_PREALLOC],
    ]
}
