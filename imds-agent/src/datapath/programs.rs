//! Programs of the BPF object: loads them, and keeps the rejected ones apart.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
};

use aya::{
    maps::{MapData, MapError},
    programs::ProgramInfo,
};
use imds_ebpf_common::{
    Hook,
    names::{MAP_POLICY, MAP_REJECTED, in_object, programs, programs_of},
};

use super::{
    loader::{LoadedObject, RejectedProgram},
    object::{Maps, ObjectError},
    pin::dir::{self, PinDir},
    sys::bpf,
};
use crate::config::Hooks;

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
    /// Loads the programs of these hooks. If the kernel rejects a program, adopts the one that an earlier agent pinned in
    /// `pins` for the same maps.
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
            Some((name, source)) if programs.loaded.is_empty() => {
                Err(ObjectError::program("load", name, source))
            }
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

    /// Loads a copy of a program, which uses the maps of the original.
    pub(super) fn load_copy(&self, name: &'static str) -> Result<OwnedFd, ObjectError> {
        let copy = self.object.load(name).ok_or(ObjectError::Missing(name))?;
        copy.map_err(|source| ObjectError::program("load", name, source))
    }

    /// Loads a program, or adopts the one of an earlier agent. Returns the error if the kernel rejects the program.
    fn load_program(
        &mut self,
        pins: &PinDir,
        name: &'static str,
    ) -> Result<Option<RejectedProgram>, ObjectError> {
        let rejected = match self.object.load(name).ok_or(ObjectError::Missing(name))? {
            Ok(fd) => {
                let id =
                    bpf::program_id(&fd).map_err(|error| ObjectError::program("inspect", name, error))?;
                self.loaded.insert(name, LoadedProgram { id, fd });
                if self.rejected.remove(name).is_some() {
                    log::info!("loaded the BPF program {name}, which the kernel rejected before");
                }
                return Ok(None);
            }
            Err(rejected) if rejected.is_out_of_descriptors() => {
                return Err(ObjectError::program("load", name, rejected));
            }
            Err(rejected) => rejected,
        };
        let errno = rejected.source.raw_os_error().unwrap_or(libc::EINVAL);
        let text = format!("failed to load BPF program {name}: {}", rejected.source);
        let before = self.rejected.insert(name, Rejection { errno, text: text.clone() });
        if before.is_none_or(|before| before.errno != errno) {
            let log = rejected.end_of_log().map(|log| format!("; verifier log:\n{log}")).unwrap_or_default();
            log::error!("{text}{log}");
        }
        if !self.loaded.contains_key(name)
            && let Some(earlier) = self.open_earlier(pins, name)
        {
            log::warn!("{name} of an earlier agent (program {}) keeps running", earlier.id);
            self.loaded.insert(name, earlier);
        }
        Ok(Some(rejected))
    }

    /// Opens the program that an earlier agent pinned under this name, if it uses the maps of this object.
    fn open_earlier(&self, pins: &PinDir, name: &'static str) -> Option<LoadedProgram> {
        let path = pins.program(name);
        let info = ProgramInfo::from_pin(&path).ok()?;
        let policy = self.object.map(MAP_POLICY)?.info().ok()?.id();
        if !info.map_ids().ok()??.contains(&policy) {
            return None;
        }
        Some(LoadedProgram { id: info.id(), fd: dir::open(&path).ok()?? })
    }

    /// Releases the programs of other hooks. Attached programs stay attached.
    pub fn retain_hooks(&mut self, hooks: Hooks) {
        let kept: Vec<_> = names(hooks).collect();
        self.loaded.retain(|name, _| kept.contains(name));
        self.rejected.retain(|name, _| kept.contains(name));
    }

    /// Returns the ids of all loaded programs.
    pub fn ids(&self) -> impl Iterator<Item = u32> {
        self.loaded.values().map(|program| program.id)
    }

    /// Returns the id of a program, or `None` if it is not loaded.
    pub fn id(&self, name: &str) -> Option<u32> {
        self.loaded.get(name).map(|program| program.id)
    }

    /// Returns the file descriptor of a loaded program.
    pub fn fd(&self, name: &'static str) -> Result<BorrowedFd<'_>, ObjectError> {
        match (self.loaded.get(name), self.rejected.get(name)) {
            (Some(program), _) => Ok(program.fd.as_fd()),
            (None, Some(&Rejection { errno, .. })) => {
                Err(ObjectError::program("load", name, io::Error::from_raw_os_error(errno)))
            }
            (None, None) => Err(ObjectError::Missing(name)),
        }
    }

    /// Returns an error text for each rejected program.
    pub(super) fn rejections(&self) -> impl Iterator<Item = &str> {
        self.rejected.values().map(|rejection| rejection.text.as_str())
    }

    /// Reports whether all programs of a hook are loaded.
    pub fn has_programs_of(&self, hook: Hook) -> bool {
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

/// Returns the names of the programs of these hooks.
fn names(hooks: Hooks) -> impl Iterator<Item = &'static str> {
    Hook::ALL.into_iter().filter(move |&hook| hooks.contains(hook)).flat_map(programs_of).copied()
}

/// Returns the id of the program that is pinned under this name.
pub fn pinned_program(pins: &PinDir, name: &'static str) -> Result<u32, ObjectError> {
    let info = ProgramInfo::from_pin(pins.program(name));
    Ok(info.map_err(|error| ObjectError::program("open", name, error))?.id())
}
