//! Record of the effective configuration and of the last rejected one. The record is in a pinned map, so that commands can
//! read it while no agent runs.

use std::path::{Path, PathBuf};

use aya::maps::{Array, MapData, MapError};
use imds_ebpf_common::{ConfigRecord, names::MAP_CONFIG};
use jiff::Timestamp;
use serde::{Serialize, Serializer};

use crate::{
    checksum::fnv1a,
    datapath::{
        Datapath, DatapathError, map_error,
        object::Maps,
        pin::{dir::PinDir, netns_owner},
    },
    encode::{field_text, nanoseconds, raw_field_text, text_field, timestamp},
};

/// Largest number of reads until two consecutive ones are equal. A read during an update can return a mix of both values.
const READINGS: usize = 20;

/// Effective configuration, as recorded in the map. The JSON form is a part of the status report.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
pub struct EffectiveConfig {
    /// Generation of the configuration: increases by one with each change.
    pub generation: u64,
    /// FNV-1a hash of the configuration as TOML. Unlike the generation, nodes can be compared by it.
    #[serde(serialize_with = "hexadecimal")]
    pub hash: u64,
    /// Path of the configuration file; `None` if there is no file.
    #[serde(rename = "file")]
    pub path: Option<PathBuf>,
    /// Time since which the configuration is effective.
    pub loaded_at: Timestamp,
    /// Last configuration that was rejected after this one was loaded.
    pub rejected: Option<RejectedConfig>,
    /// Exemptions that cannot be applied completely, each as `NAME: REASON`. Errors beyond the size of the record are missing.
    #[serde(skip)]
    pub exemption_errors: Vec<String>,
    /// The configuration as TOML, including all defaults.
    #[serde(skip)]
    pub text: String,
}

/// Configuration that was rejected.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct RejectedConfig {
    /// Time of the rejection.
    pub at: Timestamp,
    /// Error message, truncated to the size of the record.
    pub error: String,
}

/// Reads the record. Returns `None` before the first configuration was recorded.
pub fn read(maps: &Maps) -> Result<Option<EffectiveConfig>, MapError> {
    Ok(EffectiveConfig::from_record(&read_consistent(&maps.config)?))
}

/// Reads the record of the pinned maps; `None` if there is no record, or if the maps belong to another version or to another
/// network namespace.
pub fn pinned(pins: &PinDir) -> Option<EffectiveConfig> {
    if netns_owner::other_netns(pins).ok()?.is_some() {
        return None;
    }
    read(&Maps::open(pins).ok()?).ok()?
}

impl EffectiveConfig {
    /// Converts the value of the map. Returns `None` for a value that was never written.
    pub fn from_record(record: &ConfigRecord) -> Option<Self> {
        if record.generation == 0 {
            return None;
        }
        let path = field_text(&record.path);
        let exemption_errors = raw_field_text(&record.exemption_errors).unwrap_or_default();
        let rejected = (record.failed_at != 0)
            .then(|| RejectedConfig { at: timestamp(record.failed_at), error: field_text(&record.error) });
        let text = raw_field_text(&record.text).unwrap_or_default().to_owned();
        Some(Self {
            hash: fnv1a(&text),
            generation: record.generation,
            path: (!path.is_empty()).then(|| path.into()),
            loaded_at: timestamp(record.loaded_at),
            rejected,
            exemption_errors: exemption_errors.lines().map(str::to_owned).collect(),
            text,
        })
    }
}

impl Datapath {
    /// Reports whether `text` is the last effective configuration, possibly of an earlier agent.
    pub fn was_effective(&self, text: &str) -> Result<bool, DatapathError> {
        Ok(read(&self.maps).map_err(map_error(MAP_CONFIG))?.is_some_and(|record| record.text == text))
    }

    /// Records the effective configuration for `status` and `config show`. Returns its generation.
    pub fn record_config(&mut self, path: Option<&Path>, text: &str) -> Result<u64, DatapathError> {
        let before = read_consistent(&self.maps.config).map_err(map_error(MAP_CONFIG))?;
        let generation = before.generation.saturating_add(1);
        let path = path.map(|path| path.to_string_lossy()).unwrap_or_default();
        let record = ConfigRecord {
            generation,
            loaded_at: now(),
            failed_at: 0,
            path: text_field(&path),
            error: text_field(""),
            text: text_field(text),
            ..before
        };
        self.maps.config.set(0, record, 0).map_err(map_error(MAP_CONFIG))?;
        Ok(generation)
    }

    /// Records the exemptions that cannot be applied completely, one line each.
    pub fn record_exemption_errors(&mut self, errors: &str) -> Result<(), DatapathError> {
        let before = read_consistent(&self.maps.config).map_err(map_error(MAP_CONFIG))?;
        let record = ConfigRecord { exemption_errors: text_field(errors), ..before };
        self.maps.config.set(0, record, 0).map_err(map_error(MAP_CONFIG))
    }

    /// Records the error of a rejected configuration. The previous one stays effective.
    pub fn record_rejected_config(&mut self, error: &str) -> Result<(), DatapathError> {
        let before = read_consistent(&self.maps.config).map_err(map_error(MAP_CONFIG))?;
        let record = ConfigRecord { failed_at: now(), error: text_field(error), ..before };
        self.maps.config.set(0, record, 0).map_err(map_error(MAP_CONFIG))
    }
}

fn read_consistent(map: &Array<MapData, ConfigRecord>) -> Result<ConfigRecord, MapError> {
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

/// Serializes a hash as 16 hexadecimal digits: JSON numbers of most programs have 53 bits.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature that serde requires")]
fn hexadecimal<S: Serializer>(hash: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{hash:016x}"))
}

fn now() -> u64 {
    nanoseconds(Timestamp::now())
}
