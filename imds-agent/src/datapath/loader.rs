//! Loads a BPF object: creates or opens its maps, then loads programs on them one at a time.
//!
//! Uses the parser and the relocations of `aya-obj`. Does not use `aya::EbpfLoader`, whose constructor parses the BTF of the
//! running kernel: that takes 15 MiB of memory, and only programs with CO-RE relocations need it.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    io,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    path::PathBuf,
};

use aya::{
    EbpfError, features,
    maps::{MapData, MapError},
};
use aya_obj::{
    EbpfSectionKind, Function, Object, Program, ProgramSection,
    generated::{bpf_attach_type, bpf_prog_type},
};
use thiserror::Error;

use super::sys::bpf;
use crate::encode::name_field;

/// Sizes in bytes of the buffer for the verifier's log, tried in this order until the log fits.
const LOG_SIZES: [usize; 3] = [1 << 20, 1 << 23, 1 << 26];
/// Number of lines at the end of the verifier's log that the agent's log shows.
const LOG_LINES: usize = 20;

/// Error of a program that the kernel rejected.
#[derive(Debug, Error)]
#[error("{source}{}{log}", if log.is_empty() { "" } else { "; verifier log:\n" })]
pub(super) struct RejectedProgram {
    /// Error of bpf(2).
    pub(super) source: io::Error,
    log: String,
}

impl RejectedProgram {
    /// Reports whether the process or the system has no descriptor left, which is no objection to the program.
    pub(super) fn is_out_of_descriptors(&self) -> bool {
        matches!(self.source.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
    }

    /// Returns the last lines of the verifier's log, which have the reason.
    pub(super) fn end_of_log(&self) -> Option<String> {
        let lines: Vec<_> = self.log.trim_end().lines().collect();
        let (_, end) = lines.split_at(lines.len().saturating_sub(LOG_LINES));
        (!end.is_empty()).then(|| end.join("\n"))
    }
}

/// BPF object with created maps and relocated programs.
#[derive(Debug)]
pub(super) struct LoadedObject {
    programs: BTreeMap<String, (Program, Function)>,
    btf: Option<OwnedFd>,
    /// Maps by name. Keeps the file descriptors open that the programs refer to.
    maps: BTreeMap<String, MapData>,
}

impl LoadedObject {
    /// Parses the object `data`, sets these global variables, and creates the maps. A map that is pinned at its path in `pins` is
    /// opened there instead. Pins nothing. Overwrites the variables in a pinned map.
    pub(super) fn new(
        data: &[u8],
        globals: HashMap<&str, (&[u8], bool)>,
        pins: impl Fn(&str) -> Option<PathBuf>,
    ) -> Result<Self, EbpfError> {
        let mut object = Object::parse(data)?;
        object.patch_map_data(globals)?;
        let btf = load_btf(&mut object)?;
        let mut maps = Vec::new();
        for (name, definition) in object.maps.drain() {
            let map = match pins(&name).filter(|path| path.exists()) {
                Some(path) => MapData::from_pin(path)?,
                None => create(&name, &definition, btf.as_ref())?,
            };
            initialize(&map, &definition)?;
            maps.push((name, definition, map));
        }
        let sections: HashSet<_> = object.functions.keys().map(|(section, _)| *section).collect();
        let by_name = maps
            .iter()
            .map(|(name, definition, map)| (name.as_str(), map.fd().as_fd().as_raw_fd(), definition));
        object.relocate_maps(by_name, &sections)?;
        object.relocate_calls(&sections)?;
        object.sanitize_functions(features());
        let Object { programs, functions, .. } = object;
        let functions = &functions;
        let with_function = |(name, program): (String, Program)| {
            let function = functions.get(&program.function_key())?.clone();
            Some((name, (program, function)))
        };
        let programs = programs.into_iter().filter_map(with_function).collect();
        Ok(Self { programs, btf, maps: maps.into_iter().map(|(name, _, map)| (name, map)).collect() })
    }

    /// Returns the map with this name in the object.
    pub(super) fn map(&self, name: &str) -> Option<&MapData> {
        self.maps.get(name)
    }

    /// Loads a program. Returns `None` if the object has no program with this name, or its type is not supported.
    pub(super) fn load(&self, name: &str) -> Option<Result<OwnedFd, RejectedProgram>> {
        let (program, function) = self.programs.get(name)?;
        let (prog_type, attach_type) = types(&program.section)?;
        let func_info = function.func_info.func_info_bytes();
        let line_info = function.line_info.line_info_bytes();
        Some(load_with_log(&bpf::ProgLoad {
            prog_type: prog_type as u32,
            instructions: &function.instructions,
            license: &program.license,
            name: name_field(name),
            attach_type: attach_type.map_or(0, |attach_type| attach_type as u32),
            btf: self.btf.as_ref(),
            func_info: (&func_info, function.func_info_rec_size),
            line_info: (&line_info, function.line_info_rec_size),
        }))
    }
}

/// Loads a program. If the kernel rejects it, loads it again for the verifier's log.
fn load_with_log(request: &bpf::ProgLoad<'_>) -> Result<OwnedFd, RejectedProgram> {
    let source = match bpf::prog_load(request, &mut []) {
        Ok(program) => return Ok(program),
        Err(error) => error,
    };
    for size in LOG_SIZES {
        let mut log = vec![0; size];
        match bpf::prog_load(request, &mut log) {
            Ok(program) => return Ok(program),
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {}
            Err(_) => {
                let text = log.split(|&byte| byte == 0).next().unwrap_or_default();
                return Err(RejectedProgram { source, log: String::from_utf8_lossy(text).into_owned() });
            }
        }
    }
    Err(RejectedProgram { source, log: String::new() })
}

/// Returns the type of the programs in a section, and their expected attach type.
fn types(section: &ProgramSection) -> Option<(bpf_prog_type, Option<bpf_attach_type>)> {
    match *section {
        ProgramSection::SchedClassifier => Some((bpf_prog_type::BPF_PROG_TYPE_SCHED_CLS, None)),
        ProgramSection::CgroupSkb { attach_type } => {
            Some((bpf_prog_type::BPF_PROG_TYPE_CGROUP_SKB, attach_type.map(Into::into)))
        }
        ProgramSection::CgroupSockAddr { attach_type } => {
            Some((bpf_prog_type::BPF_PROG_TYPE_CGROUP_SOCK_ADDR, Some(attach_type.into())))
        }
        _ => None,
    }
}

/// Loads the BTF of the object, if the kernel supports BTF. Without BTF, `bpftool` shows only raw values.
fn load_btf(object: &mut Object) -> Result<Option<OwnedFd>, EbpfError> {
    let Some(supported) = features().btf() else { return Ok(None) };
    let Some(btf) = object.fixup_and_sanitize_btf(supported)? else { return Ok(None) };
    let loaded = bpf::btf_load(&btf.to_bytes());
    Ok(loaded.inspect_err(|error| log::warn!("failed to load the BTF of the BPF object: {error}")).ok())
}

fn create(name: &str, definition: &aya_obj::Map, btf: Option<&OwnedFd>) -> Result<MapData, MapError> {
    MapData::create(definition.clone(), name, btf.map(|btf| btf.as_fd()))
}

/// Writes the variables of a section to its map, and freezes the map of constants.
fn initialize(map: &MapData, definition: &aya_obj::Map) -> Result<(), MapError> {
    let failed = |call| move |io_error| MapError::SyscallError(aya::sys::SyscallError { call, io_error });
    if !definition.data().is_empty() {
        bpf::map_write(map.fd(), definition.data()).map_err(failed("bpf_map_update_elem"))?;
    }
    if definition.section_kind() == EbpfSectionKind::Rodata {
        bpf::map_freeze(map.fd()).map_err(failed("bpf_map_freeze"))?;
    }
    Ok(())
}
