//! The embedded BPF object: compares its maps with the pinned ones, loads the programs, and opens the maps.

use std::{
    collections::BTreeMap,
    fs, io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::Path,
    ptr, slice,
};

use aya::{
    EbpfError,
    maps::{Array, HashMap, Map, MapData, MapError, MapInfo, PerCpuHashMap, RingBuf},
    programs::{ProgramError, ProgramInfo, ProgramType},
    sys::is_helper_supported,
};
use aya_obj::{Object, generated::bpf_func_id};
use imds_ebpf_common::{
    Address, AllowedProcess, CgroupRecord, ConfigRecord, Counter, CounterKey, Endpoint, Exemption, Grant,
    Hook, InterfaceRecord, KubernetesRecord, PodRecord, Policy, PolicyTable, ProbeRecord, ProviderRecord,
    Subject,
    event::{RateLimitKey, RateLimiter},
    maps::MAP_SCHEMA_VERSION,
    names::{
        GLOBAL_CGROUP_HAS_COOKIE, GLOBAL_HAS_SET_RETVAL, GLOBAL_TC_HAS_COOKIE, MAP_CGROUP, MAP_CONFIG,
        MAP_COUNTERS, MAP_ENDPOINTS, MAP_EVENTS, MAP_EXEMPT, MAP_EXEMPT_SOURCES, MAP_FILTER, MAP_INTERFACES,
        MAP_KUBERNETES, MAP_NODE_ALLOW, MAP_PODS, MAP_POLICY, MAP_PROBES, MAP_PROBING, MAP_PROVIDER,
        MAP_RATELIMIT, MAP_REJECTED, MAPS, SYMBOL_FILTER, in_object, programs, programs_of,
    },
};
use thiserror::Error;

use super::{
    loader::{LoadedObject, RejectedProgram},
    pin::dir::{self, PinDir, PinError},
    sys::bpf,
};
use crate::config::Hooks;

/// ELF file of the BPF object, as built by `imds-ebpf-build`.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("IMDS_EBPF_OBJECT"));

/// Error of the BPF object, its programs or its maps.
#[derive(Debug, Error)]
pub enum ObjectError {
    /// Parsing the object or creating a map failed.
    #[error("failed to load the BPF object")]
    Load(#[from] EbpfError),
    /// The kernel has rejected all programs, or one of them for another reason than the program itself. The source contains
    /// the verifier's log.
    #[error("failed to load BPF program {name}")]
    Rejected {
        /// Name of the program.
        name: &'static str,
        /// Error of the kernel.
        source: RejectedProgram,
    },
    /// A program is not loaded, because the kernel rejected it.
    #[error("failed to load BPF program {name}")]
    NotLoaded {
        /// Name of the program that is missing.
        name: &'static str,
        /// Error of bpf(2) when the program was loaded.
        source: io::Error,
    },
    /// Inspecting a loaded program failed.
    #[error("failed to inspect BPF program {name}")]
    Inspect {
        /// Name of the program.
        name: &'static str,
        /// Error of the kernel.
        source: io::Error,
    },
    /// Opening a pinned program failed.
    #[error("failed to open BPF program {name}")]
    Program {
        /// Name of the program.
        name: &'static str,
        /// Error of the kernel.
        source: Box<ProgramError>,
    },
    /// Opening or reading a map failed, or it has another type.
    #[error("failed to open or read map {name}")]
    Map {
        /// Name of the map.
        name: &'static str,
        /// Error of the kernel.
        source: MapError,
    },
    /// The pinned maps have the layout of another version of the agent.
    #[error(
        "the maps belong to another version of imds-agent ({0}): use the binary of that version, or start the agent of this \
         version, which replaces them"
    )]
    OtherVersion(String),
    /// The embedded object lacks a program or map of this version.
    #[error("the embedded BPF object has no {0}")]
    Missing(&'static str),
    /// Reading or writing a pin failed.
    #[error(transparent)]
    Pin(#[from] PinError),
}

/// Loaded programs. They stay in the kernel while this value lives, or while they are pinned or attached.
#[derive(Debug)]
pub struct Programs {
    object: LoadedObject,
    loaded: BTreeMap<&'static str, LoadedProgram>,
    /// Programs that the kernel rejected.
    rejected: BTreeMap<&'static str, Rejection>,
}

#[derive(Debug)]
struct Rejection {
    errno: i32,
    text: String,
}

#[derive(Debug)]
struct LoadedProgram {
    id: u32,
    fd: OwnedFd,
}

impl Programs {
    /// Loads the programs of these hooks. If the kernel rejects a program, adopts the one that an earlier agent pinned in `pins`
    /// for the same maps.
    ///
    /// Returns an error if the kernel rejects all programs.
    pub(super) fn load(object: LoadedObject, pins: &PinDir, hooks: Hooks) -> Result<Self, ObjectError> {
        let mut programs = Self { object, loaded: BTreeMap::new(), rejected: BTreeMap::new() };
        let mut first = None;
        for name in names(hooks) {
            let rejection = programs.load_program(pins, name)?;
            first = first.or(rejection.map(|source| (name, source)));
        }
        match first {
            Some((name, source)) if programs.loaded.is_empty() => Err(ObjectError::Rejected { name, source }),
            Some(_) | None => Ok(programs),
        }
    }

    /// Loads the programs of these hooks that are neither loaded nor rejected.
    pub fn add(&mut self, pins: &PinDir, hooks: Hooks) -> Result<(), ObjectError> {
        for name in names(hooks) {
            if !self.loaded.contains_key(name) && !self.rejected.contains_key(name) {
                self.load_program(pins, name)?;
            }
        }
        Ok(())
    }

    /// Tries to load the rejected programs again, as a security policy may allow them now. Returns whether one was loaded.
    pub fn retry_rejected(&mut self, pins: &PinDir) -> Result<bool, ObjectError> {
        let before = self.rejected.len();
        for name in self.rejected.keys().copied().collect::<Vec<_>>() {
            self.load_program(pins, name)?;
        }
        Ok(self.rejected.len() < before)
    }

    /// Loads a program, or adopts the one of an earlier agent. Returns the error if the kernel rejects the program.
    fn load_program(
        &mut self,
        pins: &PinDir,
        name: &'static str,
    ) -> Result<Option<RejectedProgram>, ObjectError> {
        let source = match self.object.load(name).ok_or(ObjectError::Missing(name))? {
            Ok(fd) => {
                let id = bpf::program_id(&fd).map_err(|source| ObjectError::Inspect { name, source })?;
                self.loaded.insert(name, LoadedProgram { id, fd });
                if self.rejected.remove(name).is_some() {
                    log::info!("loaded the BPF program {name}, which the kernel rejected before");
                }
                return Ok(None);
            }
            Err(source) if source.is_out_of_descriptors() => {
                return Err(ObjectError::Rejected { name, source });
            }
            Err(source) => source,
        };
        let errno = source.source().raw_os_error().unwrap_or(libc::EINVAL);
        let text = format!("failed to load BPF program {name}: {}", source.source());
        let before = self.rejected.insert(name, Rejection { errno, text: text.clone() });
        if before.is_none_or(|before| before.errno != errno) {
            let log =
                source.end_of_log().map(|log| format!("; the verifier says:\n{log}")).unwrap_or_default();
            log::error!("{text}{log}");
        }
        if !self.loaded.contains_key(name)
            && let Some(earlier) = self.earlier(pins, name)
        {
            log::warn!("{name} of an earlier agent (program {}) runs on", earlier.id);
            self.loaded.insert(name, earlier);
        }
        Ok(Some(source))
    }

    /// Opens the program that an earlier agent pinned under this name, if it uses the maps of this object.
    fn earlier(&self, pins: &PinDir, name: &'static str) -> Option<LoadedProgram> {
        let path = pins.program(name);
        let info = ProgramInfo::from_pin(&path).ok()?;
        let policy = self.object.map(MAP_POLICY)?.info().ok()?.id();
        if !info.map_ids().ok()??.contains(&policy) {
            return None;
        }
        Some(LoadedProgram { id: info.id(), fd: dir::open(&path).ok()?? })
    }

    /// Releases the programs of other hooks. Attached programs stay attached.
    pub fn keep(&mut self, hooks: Hooks) {
        let kept: Vec<_> = names(hooks).collect();
        self.loaded.retain(|name, _| kept.contains(name));
        self.rejected.retain(|name, _| kept.contains(name));
    }

    /// Returns the ids of all loaded programs.
    pub fn ids(&self) -> impl Iterator<Item = u32> {
        self.loaded.values().map(|program| program.id)
    }

    /// Returns the id of a program, or `None` if it is not loaded.
    #[must_use]
    pub fn id(&self, name: &str) -> Option<u32> {
        self.loaded.get(name).map(|program| program.id)
    }

    /// Returns the file descriptor of a loaded program.
    pub fn fd(&self, name: &'static str) -> Result<BorrowedFd<'_>, ObjectError> {
        match (self.loaded.get(name), self.rejected.get(name)) {
            (Some(program), _) => Ok(program.fd.as_fd()),
            (None, Some(&Rejection { errno, .. })) => {
                Err(ObjectError::NotLoaded { name, source: io::Error::from_raw_os_error(errno) })
            }
            (None, None) => Err(ObjectError::Missing(name)),
        }
    }

    /// Returns an error text for each rejected program.
    pub(super) fn rejections(&self) -> impl Iterator<Item = &str> {
        self.rejected.values().map(|rejection| rejection.text.as_str())
    }

    /// Reports whether all programs of a hook are loaded.
    #[must_use]
    pub fn has_all_of(&self, hook: Hook) -> bool {
        programs_of(hook).iter().all(|name| self.loaded.contains_key(name))
    }

    /// Records for `status` which programs the kernel rejected.
    pub(super) fn record_rejected(&self, maps: &mut Maps) -> Result<(), ObjectError> {
        for (index, name) in (0..).zip(programs()) {
            let errno = self.rejected.get(name).map_or(0, |rejection| rejection.errno.unsigned_abs());
            let failed = |source| ObjectError::Map { name: MAP_REJECTED, source };
            if maps.rejected.get(&index, 0).map_err(failed)? != errno {
                maps.rejected.set(index, errno, 0).map_err(failed)?;
            }
        }
        Ok(())
    }

    /// Pins the loaded programs, and removes the pins of all others.
    pub fn pin(&self, pins: &PinDir) -> Result<(), ObjectError> {
        for name in programs() {
            match self.loaded.get(name) {
                Some(program) if pinned_program(pins, name).ok() == Some(program.id) => {}
                Some(_) => dir::replace_pin(self.fd(name)?, &pins.program(name))?,
                // An earlier agent may have pinned it, for a hook that is off now or for other maps.
                None => dir::unpin(&pins.program(name))?,
            }
        }
        Ok(())
    }

    /// Reports whether a loaded program is not pinned, or its pin belongs to another program.
    #[must_use]
    pub fn is_unpinned(&self, pins: &PinDir) -> bool {
        self.loaded.iter().any(|(name, program)| pinned_program(pins, name).ok() != Some(program.id))
    }

    /// Opens the maps of the programs.
    pub(super) fn maps(&self) -> Result<Maps, ObjectError> {
        Maps::new(|name| {
            let map = self.object.map(in_object(name)).ok_or(ObjectError::Missing(name))?;
            let failed = |source: MapError| ObjectError::Map { name, source };
            let fd = map.fd().as_fd().try_clone_to_owned().map_err(|error| failed(error.into()))?;
            MapData::from_fd(fd).map_err(failed)
        })
    }
}

/// Creates the maps of the object, or opens those that are pinned in `pins`.
///
/// Writes the variables of the object to their map, even if that is pinned and attached programs use it. `filter` must
/// therefore match all endpoints that are protected now.
pub(super) fn load_maps(pins: Option<&PinDir>, filter: &PolicyTable) -> Result<LoadedObject, ObjectError> {
    let features = kernel_features();
    let features = features.iter().map(|(name, value)| (*name, (slice::from_ref(value), true)));
    let globals = features.chain([(SYMBOL_FILTER, (bytes_of(filter), true))]).collect();
    let pin = |name: &str| {
        let map = MAPS.into_iter().find(|&map| in_object(map) == name)?;
        Some(pins?.map(map))
    };
    Ok(LoadedObject::new(OBJECT, globals, pin)?)
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

fn bytes_of(filter: &PolicyTable) -> &[u8] {
    // SAFETY: `PolicyTable` is plain data without padding (`aya::Pod`), and the result borrows it.
    unsafe { slice::from_raw_parts(ptr::from_ref(filter).cast(), size_of::<PolicyTable>()) }
}

/// Returns the names of the programs of these hooks.
fn names(hooks: Hooks) -> impl Iterator<Item = &'static str> {
    Hook::ALL.into_iter().filter(move |&hook| hooks.has(hook)).flat_map(programs_of).copied()
}

/// Reports whether TC programs can read the network namespace cookie of a packet's socket.
pub(super) fn tc_has_cookie() -> bool {
    has_cookie(ProgramType::SchedClassifier)
}

/// Returns name and value of the variables of the object that depend on the features of the running kernel.
#[must_use]
pub fn kernel_features() -> [(&'static str, u8); 3] {
    [
        (GLOBAL_TC_HAS_COOKIE, has_cookie(ProgramType::SchedClassifier).into()),
        (GLOBAL_CGROUP_HAS_COOKIE, cgroup_has_cookie().into()),
        (GLOBAL_HAS_SET_RETVAL, can_choose_errno().into()),
    ]
}

/// Reports whether programs of this type can read the network namespace cookie of a packet's socket (Linux 6.13 for TC,
/// 6.15 for cgroups).
///
/// Without the cookie, `node_egress` can't distinguish packets of macvlan and ipvlan pods from the node's own,
/// `host_network` gives verdicts on the packets of all pods, and `node_allow` gives none on packets.
fn has_cookie(program_type: ProgramType) -> bool {
    is_helper_supported(program_type, bpf_func_id::BPF_FUNC_get_netns_cookie).unwrap_or(false)
}

/// Reports whether `cgroup_skb` programs can read the network namespace cookie of a packet's socket (Linux 6.15).
#[must_use]
pub fn cgroup_has_cookie() -> bool {
    has_cookie(ProgramType::CgroupSkb)
}

/// Reports whether connect and sendmsg programs can set the error of a denied call (`bpf_set_retval`, Linux 6.1).
#[must_use]
pub fn can_choose_errno() -> bool {
    is_helper_supported(ProgramType::CgroupSockAddr, bpf_func_id::BPF_FUNC_set_retval).unwrap_or(false)
}

/// Typed handles of the pinned maps.
pub struct Maps {
    /// Mode, hooks and other settings of the programs.
    pub policy: Array<MapData, Policy>,
    /// Counters of packets and bytes by interface, hook and verdict.
    pub counters: PerCpuHashMap<MapData, CounterKey, Counter>,
    /// State of each interface, as the agent recorded it.
    pub interfaces: HashMap<MapData, u32, InterfaceRecord>,
    /// Bitmaps of the protected addresses and exempt subjects, and the table of endpoints.
    pub filter: Array<MapData, PolicyTable>,
    /// Records of the protected endpoints, by address.
    pub endpoints: HashMap<MapData, Address, Endpoint>,
    /// Grants by subject and endpoint.
    pub exempt: HashMap<MapData, Exemption, Grant>,
    /// Source addresses of exempt subjects.
    pub exempt_sources: HashMap<MapData, Exemption, u32>,
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
    held: Vec<(&'static str, MapData)>,
}

impl Maps {
    /// Opens the maps that are pinned in `pins`.
    pub fn open(pins: &PinDir) -> Result<Self, ObjectError> {
        if let Some(layout) = schema_mismatch(pins) {
            return Err(ObjectError::OtherVersion(format!(
                "layout {layout}, this version has {MAP_SCHEMA_VERSION}"
            )));
        }
        Self::new(|name| {
            MapData::from_pin(pins.map(name)).map_err(|source| ObjectError::Map { name, source })
        })
    }

    fn new(open: impl Fn(&'static str) -> Result<MapData, ObjectError>) -> Result<Self, ObjectError> {
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
            held: MAPS.map(|name| open(name).map(|map| (name, map))).into_iter().collect::<Result<_, _>>()?,
        })
    }

    /// Pins maps again whose pins were removed or replaced. Returns `true` if there were any.
    pub fn restore_pins(&self, pins: &PinDir) -> Result<bool, ObjectError> {
        let mut restored = false;
        for &(name, ref map) in &self.held {
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
pub(super) fn incompatible_maps(pins: &PinDir) -> Result<Vec<String>, ObjectError> {
    let expected = Object::parse(OBJECT).map_err(|error| ObjectError::Load(error.into()))?.maps;
    let mut reasons = Vec::new();
    for name in MAPS {
        let path = pins.map(name);
        if !path.exists() {
            continue;
        }
        let map = expected.get(in_object(name)).ok_or(ObjectError::Missing(name))?;
        let wanted = [map.map_type(), map.key_size(), map.value_size(), map.max_entries(), map.map_flags()];
        if let Some(reason) = mismatch(&path, wanted) {
            reasons.push(format!("{}: {reason}", path.display()));
        }
    }
    if reasons.is_empty()
        && pins.map(MAP_POLICY).exists()
        && let Some(layout) = schema_mismatch(pins)
    {
        reasons.push(format!("the maps have layout {layout}, this version has {MAP_SCHEMA_VERSION}"));
    }
    Ok(reasons)
}

/// Describes the difference between the map that is pinned at `path` and the `wanted` one. Returns `None` if they match.
fn mismatch(path: &Path, wanted: [u32; 5]) -> Option<String> {
    let info = match MapInfo::from_pin(path) {
        Ok(info) => info,
        Err(error) => return Some(format!("failed to open the map: {error}")),
    };
    let map_type = info.map_type().map_or(u32::MAX, |map_type| map_type as u32);
    let found = [map_type, info.key_size(), info.value_size(), info.max_entries(), info.map_flags()];
    (found != wanted).then(|| {
        format!(
            "its type, key size, value size, entries and flags are {found:?}, this version has {wanted:?}"
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

/// Returns the id of the program that is pinned under this name.
pub fn pinned_program(pins: &PinDir, name: &'static str) -> Result<u32, ObjectError> {
    let failed = |source| ObjectError::Program { name, source: Box::new(source) };
    Ok(ProgramInfo::from_pin(pins.program(name)).map_err(failed)?.id())
}
