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

    /// Each of them.
    pub fn read(&self) -> Result<Vec<(DenialKey, DenialRecord)>, MapError> {
        object::present(self.0.iter()).collect()
    }

    /// That of one sender.
    pub fn get(&self, key: &DenialKey) -> Result<Option<DenialRecord>, MapError> {
        match self.0.get(key, 0) {
            Ok(record) => Ok(Some(record)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Writes that of one sender. Where there are too many the one goes that was heard of least recently.
    pub fn put(&mut self, key: &DenialKey, record: &DenialRecord) -> Result<(), MapError> {
        if self.get(key)?.is_none() {
            let all = self.read()?;
            if all.len() >= DENIALS
                && let Some((oldest, _)) = all.iter().min_by_key(|(_, record)| record.last)
            {
                self.remove(oldest)?;
            }
        }
        self.0.insert(key, record, 0)
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
