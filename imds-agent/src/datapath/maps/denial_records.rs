//! Counts of denials per sender and endpoint, in a pinned map.

use std::{
    cmp::Reverse,
    hash::{DefaultHasher, Hash as _, Hasher as _},
};

use aya::maps::{HashMap, Map, MapData, MapError};
use imds_ebpf_common::{
    event_log::{DENIALS, DenialKey, DenialRecord},
    names::MAP_DENIALS,
};

use crate::datapath::{
    object::{self, ObjectError},
    pin::dir::PinDir,
};

/// Map of the denial records of all senders.
#[derive(Debug)]
pub struct Denials(HashMap<MapData, DenialKey, DenialRecord>);

impl Denials {
    /// Opens the pinned map of denials.
    pub fn open(pins: &PinDir) -> Result<Self, ObjectError> {
        object::open_map(pins, MAP_DENIALS, Map::HashMap).map(Self)
    }

    /// Iterates over all records. Reads one record at a time, because all records together need much memory.
    pub fn iter(&self) -> impl Iterator<Item = Result<(DenialKey, DenialRecord), MapError>> {
        object::present(self.0.iter())
    }

    /// Returns the record of one sender, endpoint, hook and verdict.
    pub fn get(&self, key: &DenialKey) -> Result<Option<DenialRecord>, MapError> {
        match self.0.get(key, 0) {
            Ok(record) => Ok(Some(record)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Writes the record of one sender. If the map is full, evicts old records, first those of owners with many records.
    pub fn insert(&mut self, key: &DenialKey, record: &DenialRecord) -> Result<(), MapError> {
        match self.0.insert(key, record, 0) {
            Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::E2BIG) => {
                self.evict_records()?;
                self.0.insert(key, record, 0)
            }
            inserted => inserted,
        }
    }

    /// Replaces the record `old` by `new`, which has another key. If that fails, `old` stays.
    pub fn replace(
        &mut self,
        old: (&DenialKey, &DenialRecord),
        new: (&DenialKey, &DenialRecord),
    ) -> Result<(), MapError> {
        // Removed first, because the insertion into a full map evicts other records.
        self.remove(old.0)?;
        self.insert(new.0, new.1).or_else(|error| self.insert(old.0, old.1).and(Err(error)))
    }

    /// Evicts an eighth of the records at once, because the choice reads all of them.
    fn evict_records(&mut self) -> Result<(), MapError> {
        let entry = |entry: Result<(DenialKey, DenialRecord), _>| {
            entry.map(|(key, record)| (owner(&record), record.last, key))
        };
        let all = self.iter().map(entry).collect::<Result<Vec<_>, MapError>>()?;
        evicted(all, DENIALS / 8).iter().try_for_each(|key| self.remove(key))
    }

    /// Removes all records from the map.
    pub fn clear(&mut self) -> Result<(), MapError> {
        let keys: Vec<_> = object::present(self.0.keys()).collect::<Result<_, _>>()?;
        keys.iter().try_for_each(|key| self.remove(key))
    }

    /// Removes a record, if it exists.
    pub fn remove(&mut self, key: &DenialKey) -> Result<(), MapError> {
        object::removed(self.0.remove(key))
    }
}

/// Returns a hash of the owner of a sender, by which the map is shared fairly: the namespace of a pod, otherwise the cgroup
/// or the interface.
fn owner(record: &DenialRecord) -> u64 {
    let mut hasher = DefaultHasher::new();
    match record.namespace[0] {
        0 => (record.cgroup, record.interface).hash(&mut hasher),
        _ => record.namespace.hash(&mut hasher),
    }
    hasher.finish()
}

/// Chooses `count` records to evict among `(owner, time of the last denial, key)`.
///
/// Owners with the most records lose their oldest ones first, so that a flood of new pod names evicts only its own records.
/// Among owners with equally many records, the oldest records are evicted.
pub(super) fn evicted<O: Copy + Ord, K: Copy + Ord>(mut all: Vec<(O, u64, K)>, count: usize) -> Vec<K> {
    all.sort_unstable_by_key(|&(owner, last, key)| (owner, Reverse(last), key));
    let mut ranked = Vec::with_capacity(all.len());
    let (mut of, mut rank) = (None, 0_usize);
    for (owner, last, key) in all {
        rank = if of.replace(owner) == Some(owner) { rank + 1 } else { 0 };
        ranked.push((Reverse(rank), last, key));
    }
    ranked.sort_unstable();
    ranked.into_iter().take(count).map(|(.., key)| key).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flood_evicts_records_of_its_owner() {
        let flood = (0..90).map(|number| (1, 1000 + number, number));
        let others = (0..10).map(|number| (2 + number, number, 100 + number));
        let evicted = evicted(flood.chain(others).collect(), 20);
        assert_eq!(evicted, (0..20).collect::<Vec<u64>>());
    }

    #[test]
    fn oldest_record_of_equal_owners_is_evicted() {
        let all = (0..10).map(|number| (number, 100 - number, number)).collect();
        assert_eq!(evicted(all, 3), [9, 8, 7]);
    }
}
