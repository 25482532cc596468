//! Typed handles of the pinned maps, and their compatibility with this version.

use std::{fs, io, path::Path};

use aya::maps::{Array, HashMap, Map, MapData, MapError, MapInfo, PerCpuHashMap, RingBuf};
use aya_obj::Object;
use imds_ebpf_common::{
    Address, AllowedProcess, CgroupRecord, ConfigRecord, Counter, CounterKey, Endpoint, ExemptionKey,
    ExemptionRecord, Hook, InterfaceRecord, KubernetesRecord, PodRecord, Policy, PolicyFilter, ProbeRecord,
    ProviderRecord, Subject,
    event::{RateLimitKey, RateLimiter},
    maps::MAP_SCHEMA_VERSION,
    names::{
        MAP_CGROUP, MAP_CONFIG, MAP_COUNTERS, MAP_ENDPOINTS, MAP_EVENTS, MAP_EXEMPT, MAP_EXEMPT_SOURCES,
        MAP_FILTER, MAP_INTERFACES, MAP_KUBERNETES, MAP_NODE_ALLOW, MAP_PODS, MAP_POLICY, MAP_PROBES,
        MAP_PROBING, MAP_PROVIDER, MAP_RATELIMIT, MAP_REJECTED, MAPS, in_object, programs_of,
    },
};

use crate::datapath::{
    object::{OBJECT, ObjectError},
    pin::dir::{self, PinDir},
};

/// Typed handles of the pinned maps.
pub struct Maps {
    /// Mode, hooks and other settings of the programs.
    pub policy: Array<MapData, Policy>,
    /// Counters of packets and bytes by interface, hook and verdict.
    pub counters: PerCpuHashMap<MapData, CounterKey, Counter>,
    /// State of each interface, as the agent recorded it.
    pub interfaces: HashMap<MapData, u32, InterfaceRecord>,
    /// Bitmaps of the protected addresses and exempt subjects, and the table of endpoints.
    pub filter: Array<MapData, PolicyFilter>,
    /// Records of the protected endpoints, by address.
    pub endpoints: HashMap<MapData, Address, Endpoint>,
    /// Exemptions by subject and endpoint.
    pub exempt: HashMap<MapData, ExemptionKey, ExemptionRecord>,
    /// Source addresses of exempt subjects.
    pub exempt_sources: HashMap<MapData, ExemptionKey, u32>,
    /// Test senders of `imds-agent verify`.
    pub probes: HashMap<MapData, Subject, ProbeRecord>,
    /// Number of entries in `probes`.
    pub probing: Array<MapData, u32>,
    /// Allow list of the node, with the numbers of its entries.
    pub node_allow: HashMap<MapData, AllowedProcess, u32>,
    /// Configured and effective provider of the endpoints.
    pub provider: Array<MapData, ProviderRecord>,
    /// Effective configuration, as text.
    pub config: Array<MapData, ConfigRecord>,
    /// Desired state of the cgroup hooks.
    pub cgroup: Array<MapData, CgroupRecord>,
    /// Error numbers of rejected programs, in the order of [`programs`]; 0 for the others.
    pub rejected: Array<MapData, u32>,
    /// Status of the pod watch, written by the agent.
    pub kubernetes: Array<MapData, KubernetesRecord>,
    /// Pod metadata by interface, network namespace and cgroup.
    pub pods: HashMap<MapData, Subject, PodRecord>,
    /// Rate-limit state of events by source, except at `from_pod`, where it is part of the counters.
    pub sources: PerCpuHashMap<MapData, RateLimitKey, RateLimiter>,
    /// All pinned maps by name, to pin them again.
    all: Vec<(&'static str, MapData)>,
}

impl Maps {
    /// Opens the maps that are pinned in `pins`.
    pub fn open(pins: &PinDir) -> Result<Self, ObjectError> {
        if let Some(layout) = schema_mismatch(pins) {
            return Err(ObjectError::OtherVersion(format!(
                "schema {layout}, this version has {MAP_SCHEMA_VERSION}"
            )));
        }
        Self::new(|name| {
            MapData::from_pin(pins.map(name)).map_err(|source| ObjectError::Map { name, source })
        })
    }

    pub(in crate::datapath) fn new(
        open: impl Fn(&'static str) -> Result<MapData, ObjectError>,
    ) -> Result<Self, ObjectError> {
        let typed = |name| {
            move |source| match source {
                MapError::InvalidKeySize { .. } | MapError::InvalidValueSize { .. } => {
                    ObjectError::OtherVersion(format!("{name} has an {source}"))
                }
                source => ObjectError::Map { name, source },
            }
        };
        Ok(Self {
            policy: Map::Array(open(MAP_POLICY)?).try_into().map_err(typed(MAP_POLICY))?,
            counters: Map::PerCpuHashMap(open(MAP_COUNTERS)?).try_into().map_err(typed(MAP_COUNTERS))?,
            interfaces: Map::HashMap(open(MAP_INTERFACES)?).try_into().map_err(typed(MAP_INTERFACES))?,
            filter: Map::Array(open(MAP_FILTER)?).try_into().map_err(typed(MAP_FILTER))?,
            endpoints: Map::HashMap(open(MAP_ENDPOINTS)?).try_into().map_err(typed(MAP_ENDPOINTS))?,
            exempt: Map::HashMap(open(MAP_EXEMPT)?).try_into().map_err(typed(MAP_EXEMPT))?,
            exempt_sources: Map::HashMap(open(MAP_EXEMPT_SOURCES)?)
                .try_into()
                .map_err(typed(MAP_EXEMPT_SOURCES))?,
            probes: Map::HashMap(open(MAP_PROBES)?).try_into().map_err(typed(MAP_PROBES))?,
            probing: Map::Array(open(MAP_PROBING)?).try_into().map_err(typed(MAP_PROBING))?,
            node_allow: Map::HashMap(open(MAP_NODE_ALLOW)?).try_into().map_err(typed(MAP_NODE_ALLOW))?,
            provider: Map::Array(open(MAP_PROVIDER)?).try_into().map_err(typed(MAP_PROVIDER))?,
            config: Map::Array(open(MAP_CONFIG)?).try_into().map_err(typed(MAP_CONFIG))?,
            cgroup: Map::Array(open(MAP_CGROUP)?).try_into().map_err(typed(MAP_CGROUP))?,
            rejected: Map::Array(open(MAP_REJECTED)?).try_into().map_err(typed(MAP_REJECTED))?,
            kubernetes: Map::Array(open(MAP_KUBERNETES)?).try_into().map_err(typed(MAP_KUBERNETES))?,
            pods: Map::HashMap(open(MAP_PODS)?).try_into().map_err(typed(MAP_PODS))?,
            sources: Map::PerCpuLruHashMap(open(MAP_RATELIMIT)?).try_into().map_err(typed(MAP_RATELIMIT))?,
            all: MAPS.map(|name| open(name).map(|map| (name, map))).into_iter().collect::<Result<_, _>>()?,
        })
    }

    /// Pins maps again whose pins were removed or replaced. Returns `true` if there were any.
    pub fn restore_pins(&self, pins: &PinDir) -> Result<bool, ObjectError> {
        let mut restored = false;
        for &(name, ref map) in &self.all {
            let failed = |source| ObjectError::Map { name, source };
            let path = pins.map(name);
            let id = map.info().map_err(failed)?.id();
            if !MapInfo::from_pin(&path).is_ok_and(|pinned| pinned.id() == id) {
                dir::replace_pin(map.fd(), &path)?;
                restored = true;
            }
        }
        Ok(restored)
    }
}

/// Returns a reason for each pinned map that this version would misread. Returns no reason if all pinned maps are usable.
pub(in crate::datapath) fn incompatible_maps(pins: &PinDir) -> Result<Vec<String>, ObjectError> {
    let expected = Object::parse(OBJECT).map_err(|error| ObjectError::Load(error.into()))?.maps;
    let mut reasons = Vec::new();
    for name in MAPS {
        let path = pins.map(name);
        if !path.exists() {
            continue;
        }
        let map = expected.get(in_object(name)).ok_or(ObjectError::Missing(name))?;
        let compiled = [map.map_type(), map.key_size(), map.value_size(), map.max_entries(), map.map_flags()];
        if let Some(reason) = mismatch(&path, compiled) {
            reasons.push(format!("{}: {reason}", path.display()));
        }
    }
    if reasons.is_empty()
        && pins.map(MAP_POLICY).exists()
        && let Some(layout) = schema_mismatch(pins)
    {
        reasons.push(format!("the maps have schema {layout}, this version has {MAP_SCHEMA_VERSION}"));
    }
    Ok(reasons)
}

/// Describes the difference between the map that is pinned at `path` and the `compiled` one. Returns `None` if they match.
fn mismatch(path: &Path, compiled: [u32; 5]) -> Option<String> {
    let info = match MapInfo::from_pin(path) {
        Ok(info) => info,
        Err(error) => return Some(format!("failed to open the map: {error}")),
    };
    let map_type = info.map_type().map_or(u32::MAX, |map_type| map_type as u32);
    let found = [map_type, info.key_size(), info.value_size(), info.max_entries(), info.map_flags()];
    (found != compiled).then(|| {
        format!(
            "its type, key size, value size, entries and flags are {found:?}, this version has {compiled:?}"
        )
    })
}

/// Returns the layout of the pinned maps if it differs from this version's. Maps that were created but never written (layout 0)
/// count as this version's.
fn schema_mismatch(pins: &PinDir) -> Option<u32> {
    let map = MapData::from_pin(pins.map(MAP_POLICY)).ok()?;
    let policy: Array<MapData, Policy> = Map::Array(map).try_into().ok()?;
    let layout = policy.get(&0, 0).ok()?.layout;
    (layout != MAP_SCHEMA_VERSION && layout != 0).then_some(layout)
}

/// Skips entries that are removed during the iteration over a map.
pub fn present<T>(
    entries: impl Iterator<Item = Result<T, MapError>>,
) -> impl Iterator<Item = Result<T, MapError>> {
    entries.filter(|entry| !matches!(entry, Err(MapError::KeyNotFound)))
}

/// Returns the result of the removal of an entry. An entry that is missing counts as removed.
pub fn removed(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        other => other,
    }
}

/// Opens the pinned ring buffer of events.
pub fn open_events(pins: &PinDir) -> Result<RingBuf<MapData>, ObjectError> {
    let failed = |source| ObjectError::Map { name: MAP_EVENTS, source };
    let map = MapData::from_pin(pins.map(MAP_EVENTS)).map_err(failed)?;
    Map::RingBuf(map).try_into().map_err(failed)
}

/// Reports whether maps of an agent are pinned, which implies that programs are loaded.
#[must_use]
pub fn is_loaded(pins: &PinDir) -> bool {
    fs::exists(pins.map(MAP_POLICY)).unwrap_or(false)
}

/// Returns the rejected programs with the errors of the kernel.
pub fn rejected_programs(maps: &Maps) -> Result<Vec<(Hook, &'static str, io::Error)>, MapError> {
    let mut rejected = Vec::new();
    let of_hooks =
        Hook::ALL.into_iter().flat_map(|hook| programs_of(hook).iter().map(move |&name| (hook, name)));
    for (index, (hook, name)) in (0..).zip(of_hooks) {
        let errno = maps.rejected.get(&index, 0)?;
        if errno != 0 {
            rejected.push((hook, name, io::Error::from_raw_os_error(errno.cast_signed())));
        }
    }
    Ok(rejected)
}

#[cfg(test)]
mod tests {
    use aya::sys::SyscallError;

    use super::*;

    #[test]
    fn missing_entry_counts_as_removed() {
        let failed = |errno| {
            let io_error = io::Error::from_raw_os_error(errno);
            removed(Err(SyscallError { call: "bpf_map_delete_elem", io_error }.into()))
        };
        assert!(failed(libc::ENOENT).is_ok() && failed(libc::EPERM).is_err());
    }
}
