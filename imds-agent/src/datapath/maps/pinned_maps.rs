//! Typed handles of the pinned maps, and their compatibility with this version.

use std::{collections::BTreeMap, fs, io, path::Path};

use aya::maps::{Array, HashMap, Map, MapData, MapError, MapInfo, PerCpuHashMap, RingBuf};
use aya_obj::Object;
use imds_ebpf_common::{
    Address, AllowedProcess, CgroupRecord, ConfigRecord, Counter, CounterKey, Endpoint, ExemptionKey,
    ExemptionRecord, Hook, InterfaceRecord, KubernetesRecord, ListenerKey, PodRecord, Policy, PolicyFilter,
    ProbeRecord, ProviderRecord, RedirectRecord, Subject,
    event::{RateLimitKey, RateLimiter},
    maps::MAP_SCHEMA_VERSION,
    names::{
        MAP_CGROUP, MAP_CONFIG, MAP_COUNTERS, MAP_ENDPOINTS, MAP_EVENTS, MAP_EXEMPT, MAP_EXEMPT_SOURCES,
        MAP_FILTER, MAP_INTERFACES, MAP_KUBERNETES, MAP_LISTENERS, MAP_NODE_ALLOW, MAP_PODS, MAP_POLICY,
        MAP_PROBES, MAP_PROBING, MAP_PROVIDER, MAP_RATELIMIT, MAP_REDIRECT, MAP_REJECTED, MAP_REQUEST_STARTS,
        MAPS, in_object, programs_of,
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
    /// Listeners of scoped exemptions by netns cookie and endpoint.
    pub redirects: HashMap<MapData, ExemptionKey, RedirectRecord>,
    /// Endpoints of these listeners.
    pub listeners: HashMap<MapData, ListenerKey, Address>,
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
        Ok(Self {
            policy: typed(&open, MAP_POLICY, Map::Array)?,
            counters: typed(&open, MAP_COUNTERS, Map::PerCpuHashMap)?,
            interfaces: typed(&open, MAP_INTERFACES, Map::HashMap)?,
            filter: typed(&open, MAP_FILTER, Map::Array)?,
            endpoints: typed(&open, MAP_ENDPOINTS, Map::HashMap)?,
            exempt: typed(&open, MAP_EXEMPT, Map::HashMap)?,
            exempt_sources: typed(&open, MAP_EXEMPT_SOURCES, Map::HashMap)?,
            redirects: typed(&open, MAP_REDIRECT, Map::HashMap)?,
            listeners: typed(&open, MAP_LISTENERS, Map::HashMap)?,
            probes: typed(&open, MAP_PROBES, Map::HashMap)?,
            probing: typed(&open, MAP_PROBING, Map::Array)?,
            node_allow: typed(&open, MAP_NODE_ALLOW, Map::HashMap)?,
            provider: typed(&open, MAP_PROVIDER, Map::Array)?,
            config: typed(&open, MAP_CONFIG, Map::Array)?,
            cgroup: typed(&open, MAP_CGROUP, Map::Array)?,
            rejected: typed(&open, MAP_REJECTED, Map::Array)?,
            kubernetes: typed(&open, MAP_KUBERNETES, Map::Array)?,
            pods: typed(&open, MAP_PODS, Map::HashMap)?,
            sources: typed(&open, MAP_RATELIMIT, Map::PerCpuLruHashMap)?,
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

/// Opens a map of the type that `kind` stands for. A map of another version has keys or values of another size.
fn typed<M: TryFrom<Map, Error = MapError>>(
    open: impl Fn(&'static str) -> Result<MapData, ObjectError>,
    name: &'static str,
    kind: fn(MapData) -> Map,
) -> Result<M, ObjectError> {
    kind(open(name)?).try_into().map_err(|source| match source {
        MapError::InvalidKeySize { .. } | MapError::InvalidValueSize { .. } => {
            ObjectError::OtherVersion(format!("{name} has an {source}"))
        }
        source => ObjectError::Map { name, source },
    })
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

/// Reports whether a map with this type, key size, value size, entries and flags is pinned at `path`.
pub(super) fn is_layout_of(path: &Path, layout: [u32; 5]) -> bool {
    mismatch(path, layout).is_none()
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
    let layout = pinned_policy(pins)?.layout;
    (layout != MAP_SCHEMA_VERSION && layout != 0).then_some(layout)
}

/// Returns the pinned policy, or `None` if it is unreadable. Its layout may be that of another version.
pub(in crate::datapath) fn pinned_policy(pins: &PinDir) -> Option<Policy> {
    open_map::<Array<_, Policy>>(pins, MAP_POLICY, Map::Array).ok()?.get(&0, 0).ok()
}

/// Opens a pinned map of the type that `kind` stands for.
pub fn open_map<M: TryFrom<Map, Error = MapError>>(
    pins: &PinDir,
    name: &'static str,
    kind: fn(MapData) -> Map,
) -> Result<M, ObjectError> {
    let map = MapData::from_pin(pins.map(name)).and_then(|map| kind(map).try_into());
    map.map_err(|source| ObjectError::Map { name, source })
}

/// Replaces the entries of a map. Removes obsolete ones first, to make room. Returns the number of map updates.
pub(in crate::datapath) fn sync<K: aya::Pod + Ord, V: aya::Pod + PartialEq>(
    map: &mut HashMap<MapData, K, V>,
    desired: &BTreeMap<K, V>,
) -> Result<usize, MapError> {
    let before = present(map.iter()).collect::<Result<BTreeMap<_, _>, _>>()?;
    let mut writes = 0;
    for key in before.keys().filter(|key| !desired.contains_key(key)) {
        removed(map.remove(key))?;
        writes += 1;
    }
    for (key, value) in desired.iter().filter(|(key, value)| before.get(key) != Some(value)) {
        map.insert(key, value, 0)?;
        writes += 1;
    }
    Ok(writes)
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
    open_map(pins, MAP_EVENTS, Map::RingBuf)
}

/// Opens the ring buffer of the starts of requests.
pub fn open_request_starts(pins: &PinDir) -> Result<RingBuf<MapData>, ObjectError> {
    open_map(pins, MAP_REQUEST_STARTS, Map::RingBuf)
}

/// Reports whether maps of an agent are pinned, which implies that programs are loaded.
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
