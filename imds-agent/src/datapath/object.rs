//! The BPF object: embedded, checked against what is pinned, and loaded.

use std::{
    fs,
    os::fd::{AsFd, BorrowedFd},
    path::Path,
};

use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::{Array, HashMap, Map, MapData, MapError, MapInfo, PerCpuHashMap},
    programs::{ProgramError, SchedClassifier},
};
use aya_obj::Object;
use imds_ebpf_common::{
    Address, Counter, CounterKey, Endpoint, Filter, Frame, InterfaceRecord, Policy, ProviderRecord,
    maps::LAYOUT,
    names::{
        MAP_COUNTERS, MAP_ENDPOINTS, MAP_FILTER, MAP_INTERFACES, MAP_POLICY, MAP_PROVIDER, MAPS,
        PROG_POD_EDGE, PROG_POD_EDGE_L3, SYMBOL_FILTER, in_object,
    },
};
use thiserror::Error;

use super::pins::{self, PinDir, PinError};

/// The object as the linker left it.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("IMDS_EBPF_OBJECT"));

/// Why the object can't be loaded.
#[derive(Debug, Error)]
pub enum ObjectError {
    /// Maps can't be created, or the object can't be read.
    #[error("can't load the BPF object")]
    Load(#[from] EbpfError),
    /// The kernel refuses a program; the verifier's reasons are part of the source.
    #[error("the kernel refuses the BPF program {name}")]
    Program {
        /// The program.
        name: &'static str,
        /// What the kernel said.
        source: Box<ProgramError>,
    },
    /// A map can't be opened or has another type.
    #[error("can't use the map {name}")]
    Map {
        /// The map.
        name: &'static str,
        /// What the kernel said.
        source: MapError,
    },
    /// The object that was built into the agent is not the one that it was written for.
    #[error("the embedded BPF object has no {0}")]
    Missing(&'static str),
    /// A pin can't be read or written.
    #[error(transparent)]
    Pin(#[from] PinError),
}

/// The programs, loaded; they stay in the kernel while this lives or something is attached.
#[derive(Debug)]
pub struct Programs {
    ebpf: Ebpf,
    ethernet: u32,
    ip: u32,
}

impl Programs {
    /// Loads the programs on the maps that are pinned in `pins`; what is not pinned yet is made and pinned.
    ///
    /// aya writes what the object has for a variable, also over that of a pinned map that other programs use: `filter` is
    /// what it writes, so that has to match all endpoints that are guarded.
    pub fn load(pins: &PinDir, filter: &Filter) -> Result<Self, ObjectError> {
        let mut loader = EbpfLoader::new();
        for name in MAPS {
            loader.map_pin_path(in_object(name), pins.map(name));
        }
        loader.override_global(SYMBOL_FILTER, &filter.bits[..], true);
        let mut ebpf = loader.load(OBJECT)?;
        let [ethernet, ip] = [PROG_POD_EDGE, PROG_POD_EDGE_L3].map(|name| {
            let failed = |source| ObjectError::Program { name, source: Box::new(source) };
            let program = ebpf.program_mut(name).ok_or(ObjectError::Missing(name))?;
            let program: &mut SchedClassifier = program.try_into().map_err(failed)?;
            program.load().map_err(failed)?;
            program.info().map(|info| info.id()).map_err(failed)
        });
        Ok(Self { ebpf, ethernet: ethernet?, ip: ip? })
    }

    /// Id of the program for packets that start with `frame`.
    #[must_use]
    pub fn id(&self, frame: Frame) -> u32 {
        match frame {
            Frame::Ethernet => self.ethernet,
            Frame::Ip => self.ip,
        }
    }

    /// Descriptor of the program for packets that start with `frame`.
    pub fn fd(&self, frame: Frame) -> Result<BorrowedFd<'_>, ObjectError> {
        let name = name(frame);
        let failed = |source| ObjectError::Program { name, source: Box::new(source) };
        let program = self.ebpf.program(name).ok_or(ObjectError::Missing(name))?;
        let program: &SchedClassifier = program.try_into().map_err(failed)?;
        Ok(program.fd().map_err(failed)?.as_fd())
    }

    /// Pins the programs, in place of those of an earlier agent.
    pub fn pin(&self, pins: &PinDir) -> Result<(), ObjectError> {
        for frame in [Frame::Ethernet, Frame::Ip] {
            pins::pin_over(self.fd(frame)?, &pins.program(name(frame)))?;
        }
        Ok(())
    }

    /// Whether one of the programs is not pinned, or another one in its place.
    #[must_use]
    pub fn is_unpinned(&self, pins: &PinDir) -> bool {
        [Frame::Ethernet, Frame::Ip]
            .into_iter()
            .any(|frame| pinned_program(pins, frame).map_or(true, |id| id != self.id(frame)))
    }
}

/// Name of the program for packets that start with `frame`.
#[must_use]
pub fn name(frame: Frame) -> &'static str {
    match frame {
        Frame::Ethernet => PROG_POD_EDGE,
        Frame::Ip => PROG_POD_EDGE_L3,
    }
}

/// The pinned maps.
pub struct Maps {
    /// What is in force.
    pub policy: Array<MapData, Policy>,
    /// Packets and bytes by interface and verdict.
    pub counters: PerCpuHashMap<MapData, CounterKey, Counter>,
    /// What the agent knows of each interface.
    pub interfaces: HashMap<MapData, u32, InterfaceRecord>,
    /// Slots of the guarded addresses.
    pub filter: Array<MapData, Filter>,
    /// What is guarded.
    pub endpoints: HashMap<MapData, Address, Endpoint>,
    /// Where the endpoints come from.
    pub provider: Array<MapData, ProviderRecord>,
    /// The same maps, to pin them again.
    held: [(&'static str, MapData); MAPS.len()],
}

impl Maps {
    /// Opens the maps that are pinned in `pins`.
    pub fn open(pins: &PinDir) -> Result<Self, ObjectError> {
        let open =
            |name| MapData::from_pin(pins.map(name)).map_err(|source| ObjectError::Map { name, source });
        let typed = |name| move |source| ObjectError::Map { name, source };
        Ok(Self {
            policy: Map::Array(open(MAP_POLICY)?).try_into().map_err(typed(MAP_POLICY))?,
            counters: Map::PerCpuHashMap(open(MAP_COUNTERS)?).try_into().map_err(typed(MAP_COUNTERS))?,
            interfaces: Map::HashMap(open(MAP_INTERFACES)?).try_into().map_err(typed(MAP_INTERFACES))?,
            filter: Map::Array(open(MAP_FILTER)?).try_into().map_err(typed(MAP_FILTER))?,
            endpoints: Map::HashMap(open(MAP_ENDPOINTS)?).try_into().map_err(typed(MAP_ENDPOINTS))?,
            provider: Map::Array(open(MAP_PROVIDER)?).try_into().map_err(typed(MAP_PROVIDER))?,
            held: [
                (MAP_POLICY, open(MAP_POLICY)?),
                (MAP_COUNTERS, open(MAP_COUNTERS)?),
                (MAP_INTERFACES, open(MAP_INTERFACES)?),
                (MAP_FILTER, open(MAP_FILTER)?),
                (MAP_ENDPOINTS, open(MAP_ENDPOINTS)?),
                (MAP_PROVIDER, open(MAP_PROVIDER)?),
            ],
        })
    }

    /// Pins again the maps that somebody unpinned, or put others in the place of. Returns whether that was so.
    pub fn restore_pins(&self, pins: &PinDir) -> Result<bool, ObjectError> {
        let mut restored = false;
        for &(name, ref map) in &self.held {
            let failed = |source| ObjectError::Map { name, source };
            let path = pins.map(name);
            let id = map.info().map_err(failed)?.id();
            if !MapInfo::from_pin(&path).is_ok_and(|pinned| pinned.id() == id) {
                pins::pin_over(map.fd(), &path)?;
                restored = true;
            }
        }
        Ok(restored)
    }
}

/// Removes the pins of maps that this version would misread, so that loading makes new ones. What is attached goes on
/// with the old maps until it is replaced. Returns why, for each map that was given up.
pub fn drop_foreign_maps(pins: &PinDir) -> Result<Vec<String>, ObjectError> {
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
        && let Some(layout) = other_layout(pins)
    {
        reasons.push(format!("the maps have layout {layout}, this version has {LAYOUT}"));
    }
    if !reasons.is_empty() {
        // All or none: counters of one layout with the policy of another would be neither.
        for name in MAPS {
            pins::unpin(&pins.map(name))?;
        }
    }
    Ok(reasons)
}

/// What is different about the map that is pinned at `path`, or `None` where it is the wanted one.
fn mismatch(path: &Path, wanted: [u32; 5]) -> Option<String> {
    let info = match MapInfo::from_pin(path) {
        Ok(info) => info,
        Err(error) => return Some(format!("it is no map that can be opened ({error})")),
    };
    let map_type = info.map_type().map_or(u32::MAX, |map_type| map_type as u32);
    let found = [map_type, info.key_size(), info.value_size(), info.max_entries(), info.map_flags()];
    (found != wanted).then(|| {
        format!(
            "its type, key size, value size, entries and flags are {found:?}, this version has {wanted:?}"
        )
    })
}

/// The layout that the pinned maps were written with, where it is another than this version's. Maps that were made but
/// never written are this version's for want of any other.
fn other_layout(pins: &PinDir) -> Option<u32> {
    let map = MapData::from_pin(pins.map(MAP_POLICY)).ok()?;
    let policy: Array<MapData, Policy> = Map::Array(map).try_into().ok()?;
    let layout = policy.get(&0, 0).ok()?.layout;
    (layout != LAYOUT && layout != 0).then_some(layout)
}

/// Whether programs of ours are pinned.
#[must_use]
pub fn is_loaded(pins: &PinDir) -> bool {
    fs::exists(pins.program(PROG_POD_EDGE)).unwrap_or(false)
}

/// Id of the program pinned for packets that start with `frame`.
pub fn pinned_program(pins: &PinDir, frame: Frame) -> Result<u32, ObjectError> {
    let name = name(frame);
    let failed = |source| ObjectError::Program { name, source: Box::new(source) };
    Ok(aya::programs::ProgramInfo::from_pin(pins.program(name)).map_err(failed)?.id())
}
