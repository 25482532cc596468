//! Record of the effective configuration and of the last rejected one. The record is in a pinned map, so that commands can
//! read it while no agent runs.

use std::path::{Path, PathBuf};

use aya::maps::{Array, MapData, MapError};
use imds_ebpf_common::{ConfigRecord, names::MAP_CONFIG};
use jiff::Timestamp;
use serde::{Serialize, Serializer};

use crate::{
    checksum::fnv1a,
    config::node_pool::pool_of,
    datapath::{
        Datapath, DatapathError, map_error,
        object::Maps,
        pin::{dir::PinDir, netns_owner},
        sys::bpf,
    },
    encode::{field_text, nanoseconds, raw_field_text, timestamp, write_text},
};

/// Largest number of reads until two consecutive ones are equal. A read during an update can return a mix of both values.
const READINGS: usize = 20;

/// First character of a line about a sink: `>NAME`, a tab and the error. These lines follow those of the exemptions in the same
/// field of the record. Names of exemptions consist of other characters.
const SINK_MARK: char = '>';

/// Subject of a line about an error that keeps denied pods from getting an explanation, in the place of the name of an exemption.
pub const EXPLAIN: &str = "on_deny = \"explain\"";

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
    /// Pool of the node whose settings the configuration has; `None` without one.
    pub node_pool: Option<String>,
    /// Time since which the configuration is effective.
    pub loaded_at: Timestamp,
    /// Last configuration that was rejected after this one was loaded.
    pub rejected: Option<RejectedConfig>,
    /// Exemptions that cannot be applied completely, each as `NAME: REASON`. Errors beyond the size of the record are missing.
    #[serde(skip)]
    pub exemption_errors: Vec<String>,
    /// Names and errors of failing sinks. Sinks beyond the size of the record are missing.
    #[serde(skip)]
    pub failing_sinks: Vec<(String, String)>,
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
    let record = read_consistent(&maps.config)?;
    Ok(EffectiveConfig::from_record(&record))
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
        let lines = error_lines(&record.exemption_errors);
        let rejected = (record.failed_at != 0)
            .then(|| RejectedConfig { at: timestamp(record.failed_at), error: field_text(&record.error) });
        let text = raw_field_text(&record.text).unwrap_or_default();
        Some(Self {
            hash: fnv1a(text),
            generation: record.generation,
            node_pool: pool_of(text).map(str::to_owned),
            path: (!path.is_empty()).then(|| path.into()),
            loaded_at: timestamp(record.loaded_at),
            rejected,
            exemption_errors: lines
                .iter()
                .filter(|line| !is_of_sink(line))
                .map(|&line| line.to_owned())
                .collect(),
            failing_sinks: lines.iter().filter_map(|line| parse_sink_line(line)).collect(),
            text: text.to_owned(),
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
        let mut record = read_consistent(&self.maps.config).map_err(map_error(MAP_CONFIG))?;
        record.generation = record.generation.saturating_add(1);
        record.loaded_at = now();
        record.failed_at = 0;
        write_text(&mut record.path, &path.map(|path| path.to_string_lossy()).unwrap_or_default());
        write_text(&mut record.error, "");
        write_text(&mut record.text, text);
        self.write_config_record(&record)?;
        Ok(record.generation)
    }

    /// Records the exemptions that cannot be applied completely, one line each.
    pub fn record_exemption_errors(&mut self, errors: &str) -> Result<(), DatapathError> {
        let before = read_consistent(&self.maps.config).map_err(map_error(MAP_CONFIG))?;
        let of_sinks = error_lines(&before.exemption_errors).into_iter().filter(|line| is_of_sink(line));
        let lines: Vec<_> = errors.lines().chain(of_sinks).collect();
        let lines = lines.join("\n");
        self.record_errors(before, &lines)
    }

    /// Records the names and errors of the failing sinks.
    pub fn record_failing_sinks(&mut self, failing: &[(String, String)]) -> Result<(), DatapathError> {
        let before = read_consistent(&self.maps.config).map_err(map_error(MAP_CONFIG))?;
        let of_sinks: Vec<_> =
            failing.iter().map(|(name, error)| format!("{SINK_MARK}{name}\t{error}")).collect();
        let of_exemptions =
            error_lines(&before.exemption_errors).into_iter().filter(|line| !is_of_sink(line));
        let lines: Vec<_> = of_exemptions.chain(of_sinks.iter().map(String::as_str)).collect();
        let lines = lines.join("\n");
        self.record_errors(before, &lines)
    }

    fn write_config_record(&mut self, record: &ConfigRecord) -> Result<(), DatapathError> {
        self.maps.config.set(0, record, 0).map_err(map_error(MAP_CONFIG))
    }

    fn record_errors(&mut self, mut record: Box<ConfigRecord>, lines: &str) -> Result<(), DatapathError> {
        write_text(&mut record.exemption_errors, lines);
        self.write_config_record(&record)
    }

    /// Records the error of a rejected configuration. The previous one stays effective.
    pub fn record_rejected_config(&mut self, error: &str) -> Result<(), DatapathError> {
        let mut record = read_consistent(&self.maps.config).map_err(map_error(MAP_CONFIG))?;
        record.failed_at = now();
        write_text(&mut record.error, error);
        self.write_config_record(&record)
    }
}

fn read_consistent(map: &Array<MapData, ConfigRecord>) -> Result<Box<ConfigRecord>, MapError> {
    let mut last = bpf::first_element(map)?;
    for _ in 0..READINGS {
        let record = bpf::first_element(map)?;
        if record == last {
            break;
        }
        last = record;
    }
    Ok(last)
}

fn error_lines(field: &[u8]) -> Vec<&str> {
    raw_field_text(field).unwrap_or_default().lines().collect()
}

fn is_of_sink(line: &str) -> bool {
    line.starts_with(SINK_MARK)
}

fn parse_sink_line(line: &str) -> Option<(String, String)> {
    let (name, error) = line.strip_prefix(SINK_MARK)?.split_once('\t')?;
    Some((name.to_owned(), error.to_owned()))
}

/// Serializes a hash as 16 hexadecimal digits: JSON numbers of most programs have 53 bits.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature that serde requires")]
fn hexadecimal<S: Serializer>(hash: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{hash:016x}"))
}

fn now() -> u64 {
    nanoseconds(Timestamp::now())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exemption_and_sink_errors_share_a_field() {
        // The field ends within the last line.
        let lines = error_lines(b"backup: no such cgroup\n>file:/a: b\tdisk: full\n>otlp:http");
        let of_exemptions: Vec<_> = lines.iter().filter(|line| !is_of_sink(line)).collect();
        assert_eq!(of_exemptions, [&"backup: no such cgroup"]);
        let of_sinks: Vec<_> = lines.iter().filter_map(|line| parse_sink_line(line)).collect();
        assert_eq!(of_sinks, [("file:/a: b".to_owned(), "disk: full".to_owned())]);
    }
}
