//! The embedded BPF object, its errors, and the creation of its maps.

use std::{error::Error, ptr, slice};

use super::{
    loader::LoadedObject,
    pin::dir::{PinDir, PinError},
};
use aya::{EbpfError, maps::MapError};
use imds_ebpf_common::{
    PolicyFilter,
    names::{MAPS, SYMBOL_FILTER, in_object},
};

pub(super) use super::{maps::pinned_maps::incompatible_maps, program_features::tc_has_cookie};
pub use super::{
    maps::pinned_maps::{
        Maps, is_loaded, open_events, open_map, open_request_starts, present, rejected_programs, removed,
    },
    program_features::{can_choose_errno, cgroup_has_cookie, kernel_features},
    programs::{Programs, pinned_program},
};

/// ELF file of the BPF object, as built by `imds-ebpf-build`.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("IMDS_EBPF_OBJECT"));

/// Error of the BPF object, its programs or its maps.
#[derive(Debug, thiserror::Error)]
pub enum ObjectError {
    /// Parsing the object or creating a map failed.
    #[error("failed to load the BPF object")]
    Load(#[from] EbpfError),
    /// A call on a program failed. If the kernel has rejected the program, the source contains the verifier's log.
    #[error("failed to {operation} BPF program {name}")]
    Program {
        /// Operation, for the message: a verb.
        operation: &'static str,
        /// Name of the program.
        name: &'static str,
        /// Error of the kernel.
        source: Box<dyn Error + Send + Sync>,
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

impl ObjectError {
    pub(super) fn program(
        operation: &'static str,
        name: &'static str,
        source: impl Into<Box<dyn Error + Send + Sync>>,
    ) -> Self {
        Self::Program { operation, name, source: source.into() }
    }
}

/// Creates the maps of the object, or opens those that are pinned in `pins`.
///
/// Writes the variables of the object to their map, even if that is pinned and attached programs use it. `filter` must
/// therefore match all endpoints that are protected now.
pub(super) fn load_maps(pins: Option<&PinDir>, filter: &PolicyFilter) -> Result<LoadedObject, ObjectError> {
    let features = kernel_features();
    let features = features.iter().map(|(name, value)| (*name, (slice::from_ref(value), true)));
    let globals = features.chain([(SYMBOL_FILTER, (bytes_of(filter), true))]).collect();
    let pin = |name: &str| {
        let map = MAPS.into_iter().find(|&map| in_object(map) == name)?;
        Some(pins?.map(map))
    };
    Ok(LoadedObject::new(OBJECT, globals, pin)?)
}

fn bytes_of(filter: &PolicyFilter) -> &[u8] {
    // SAFETY: `PolicyFilter` is plain data without padding (`aya::Pod`), and the result borrows it.
    unsafe { slice::from_raw_parts(ptr::from_ref(filter).cast(), size_of::<PolicyFilter>()) }
}
