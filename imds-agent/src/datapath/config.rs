//! The configuration in force as text, and what became of the last one that was tried: in a pinned map, so that it can be
//! asked for without the agent.

use std::path::{Path, PathBuf};

use aya::maps::{Array, MapData, MapError};
use imds_ebpf_common::{ConfigRecord, names::MAP_CONFIG};
use jiff::Timestamp;

use super::{DatapathError, object::Maps};
use crate::endpoints;

/// How often to read until two readings agree: the kernel copies a value while another copies it in.
const READINGS: usize = 20;

/// What is recorded of the configuration.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Record {
    /// Number of the configuration, one more with each that comes into force.
    pub generation: u64,
    /// The file it is from, if it is from one.
    pub path: Option<PathBuf>,
    /// When it came into force.
    pub loaded_at: Timestamp,
    /// The one that was refused last, if that was later.
    pub refusal: Option<Refusal>,
    /// The configuration as TOML, every default included.
    pub text: String,
}

/// A configuration that was refused.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Refusal {
    /// When.
    pub at: Timestamp,
    /// Why, perhaps cut.
    pub error: String,
}

/// What is recorded; `None` before the first configuration was.
pub fn read(maps: &Maps) -> Result<Option<Record>, MapError> {
    Ok(Record::of(&read_whole(&maps.config)?))
}

impl Record {
    /// Reads the map's form; `None` of one that was never written.
    #[must_use]
    pub fn of(record: &ConfigRecord) -> Option<Self> {
        if record.generation == 0 {
            return None;
        }
        let path = text(&record.path);
        let refusal = (record.failed_at != 0)
            .then(|| Refusal { at: timestamp(record.failed_at), error: text(&record.error) });
        Some(Self {
            generation: record.generation,
            path: (!path.is_empty()).then(|| path.into()),
            loaded_at: timestamp(record.loaded_at),
            refusal,
            text: endpoints::raw(&record.text).unwrap_or_default().to_owned(),
        })
    }
}

/// Records a configuration that is in force from now on. Returns its number.
pub(super) fn put(maps: &mut Maps, path: Option<&Path>, text: &str) -> Result<u64, DatapathError> {
    let before = read_whole(&maps.config).map_err(failed)?;
    let generation = before.generation.saturating_add(1);
    let path = path.map(|path| path.to_string_lossy()).unwrap_or_default();
    let record = ConfigRecord {
        generation,
        loaded_at: now(),
        failed_at: 0,
        path: padded(&path),
        error: padded(""),
        text: padded(text),
    };
    maps.config.set(0, record, 0).map_err(failed)?;
    Ok(generation)
}

/// Records that a configuration was refused, so that the one before is still in force.
pub(super) fn put_refusal(maps: &mut Maps, error: &str) -> Result<(), DatapathError> {
    let before = read_whole(&maps.config).map_err(failed)?;
    let record = ConfigRecord { failed_at: now(), error: padded(error), ..before };
    maps.config.set(0, record, 0).map_err(failed)
}

fn read_whole(map: &Array<MapData, ConfigRecord>) -> Result<ConfigRecord, MapError> {
    let mut last = map.get(&0, 0)?;
    for _ in 0..READINGS {
        let record = map.get(&0, 0)?;
        if record == last {
            break;
        }
        last = record;
    }
    Ok(last)
}

fn failed(source: MapError) -> DatapathError {
    DatapathError::Map { map: MAP_CONFIG, source }
}

fn now() -> u64 {
    nanoseconds(Timestamp::now())
}

/// Since the epoch.
pub(crate) fn nanoseconds(time: Timestamp) -> u64 {
    time.as_nanosecond().try_into().unwrap_or_default()
}

pub(crate) fn timestamp(nanoseconds: u64) -> Timestamp {
    Timestamp::from_nanosecond(nanoseconds.into()).unwrap_or_default()
}

/// As much of `text` as there is room for in whole characters, then zeros.
pub(crate) fn padded<const LEN: usize>(text: &str) -> [u8; LEN] {
    let (whole, _) = text.split_at(text.floor_char_boundary(LEN));
    padded_bytes(whole.as_bytes())
}

/// As many of these bytes as there is room for, then zeros.
pub(crate) fn padded_bytes<const LEN: usize>(bytes: &[u8]) -> [u8; LEN] {
    let mut padded = [0; LEN];
    for (to, from) in padded.iter_mut().zip(bytes) {
        *to = *from;
    }
    padded
}

pub(crate) fn text(padded: &[u8]) -> String {
    endpoints::unpadded(padded)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_text_is_cut_at_a_character() {
        assert_eq!(padded::<4>("a"), *b"a\0\0\0");
        assert_eq!(padded::<4>("abcde"), *b"abcd");
        assert_eq!(padded::<4>("abc\u{e4}"), *b"abc\0");
        assert_eq!(text(&padded::<6>("abc\u{e4}")), "abc\u{e4}");
    }
}
