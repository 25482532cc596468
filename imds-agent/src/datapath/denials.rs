//! Who was denied what, how often and since when, in a pinned map.

use aya::maps::{HashMap, Map, MapData, MapError};
use imds_ebpf_common::{
    ledger::{DENIALS, DenialKey, DenialRecord},
    names::MAP_DENIALS,
};

use super::{
    object::{self, ObjectError},
    pins::PinDir,
};

/// All denials.
#[derive(Debug)]
pub struct Denials(HashMap<MapData, DenialKey, DenialRecord>);

impl Denials {
    /// Those that are pinned.
    pub fn open(pins: &PinDir) -> Result<Self, ObjectError> {
        let failed = |source| ObjectError::Map { name: MAP_DENIALS, source };
        let map = MapData::from_pin(pins.map(MAP_DENIALS)).map_err(failed)?;
        Map::HashMap(map).try_into().map(Self).map_err(failed)
    }

    /// Each of them, one at a time: all together are large.
    pub fn iter(&self) -> impl Iterator<Item = Result<(DenialKey, DenialRecord), MapError>> {
        object::present(self.0.iter())
    }

    /// That of one sender.
    pub fn get(&self, key: &DenialKey) -> Result<Option<DenialRecord>, MapError> {
        match self.0.get(key, 0) {
            Ok(record) => Ok(Some(record)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Writes that of one sender. Where there are too many those go that were heard of least recently.
    pub fn put(&mut self, key: &DenialKey, record: &DenialRecord) -> Result<(), MapError> {
        match self.0.insert(key, record, 0) {
            Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::E2BIG) => {
                self.make_room()?;
                self.0.insert(key, record, 0)
            }
            inserted => inserted,
        }
    }

    /// For some at once: to find the oldest, all have to be looked at.
    fn make_room(&mut self) -> Result<(), MapError> {
        let by_time =
            |entry: Result<(DenialKey, DenialRecord), _>| entry.map(|(key, record)| (record.last, key));
        let mut all = self.iter().map(by_time).collect::<Result<Vec<_>, MapError>>()?;
        all.sort_unstable();
        all.iter().take(DENIALS / 8).try_for_each(|(_, key)| self.remove(key))
    }

    /// Forgets all.
    pub fn clear(&mut self) -> Result<(), MapError> {
        let keys: Vec<_> = object::present(self.0.keys()).collect::<Result<_, _>>()?;
        keys.iter().try_for_each(|key| self.remove(key))
    }

    fn remove(&mut self, key: &DenialKey) -> Result<(), MapError> {
        match self.0.remove(key) {
            Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
            Err(error) => Err(error),
        }
    }
}
