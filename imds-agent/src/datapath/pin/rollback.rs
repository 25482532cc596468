//! Saves the state of the pin directory before a start, and restores it if the start fails.

use std::{
    collections::BTreeMap,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use aya::maps::{Array, HashMap, Map, MapData};
use imds_ebpf_common::{
    Address, Endpoint, Policy, PolicyFilter, ProviderRecord,
    names::{MAP_ENDPOINTS, MAP_FILTER, MAP_POLICY, MAP_PROVIDER, MAPS, programs},
};

use crate::datapath::{
    DatapathError, map_error,
    maps::pinned_maps,
    object::{self, ObjectError},
    pin::dir::{self, PinDir, PinError, io_error},
    sys::bpf,
};

/// Array of one element, and the element.
type ArrayContent<V> = (Array<MapData, V>, Box<V>);
/// The map of the endpoints, and its entries.
type EndpointContent = (HashMap<MapData, Address, Endpoint>, BTreeMap<Address, Endpoint>);

/// Pins of maps and programs, and the content of the maps that a start writes before it attaches programs.
#[derive(Default)]
pub(crate) struct Rollback {
    /// Object at each path; `None` if nothing was pinned there.
    pins: Vec<(PathBuf, Option<OwnedFd>)>,
    policy: Option<ArrayContent<Policy>>,
    filter: Option<ArrayContent<PolicyFilter>>,
    provider: Option<ArrayContent<ProviderRecord>>,
    endpoints: Option<EndpointContent>,
}

impl Rollback {
    /// Opens all pins. Reads the content of maps only if `is_compatible`, because the start writes to no other maps.
    pub(crate) fn new(pins: &PinDir, is_compatible: bool) -> Result<Self, DatapathError> {
        let maps = MAPS.into_iter().map(|name| pins.map(name));
        let programs = programs().map(|name| pins.program(name));
        let pinned = maps.chain(programs).map(|path| Ok((path.clone(), open(&path)?)));
        let mut rollback = Self { pins: pinned.collect::<Result<_, PinError>>()?, ..Self::default() };
        if is_compatible {
            rollback.policy = read_array(pins, MAP_POLICY)?;
            rollback.filter = read_array(pins, MAP_FILTER)?;
            rollback.provider = read_array(pins, MAP_PROVIDER)?;
            rollback.endpoints = read_endpoints(pins)?;
        }
        Ok(rollback)
    }

    /// Returns the filter that was effective before the start.
    pub(crate) fn filter(&self) -> Option<&PolicyFilter> {
        self.filter.as_ref().map(|(_, filter)| &**filter)
    }

    /// Restores pins and content. Continues after a failure, and returns the first one.
    pub(crate) fn restore(self) -> Result<(), DatapathError> {
        let Self { pins, policy, filter, provider, endpoints } = self;
        let restored = [
            endpoints.map_or(Ok(()), restore_endpoints),
            restore_array(MAP_FILTER, filter),
            restore_array(MAP_PROVIDER, provider),
            restore_array(MAP_POLICY, policy),
        ];
        let pins = pins.into_iter().map(|(path, object)| match object {
            Some(object) => Ok(dir::replace_pin(object, &path)?),
            None => Ok(dir::unpin(&path)?),
        });
        restored.into_iter().chain(pins).fold(Ok(()), Result::and)
    }
}

/// Opens the object that is pinned at a path; `None` if there is no such object.
fn open(path: &Path) -> Result<Option<OwnedFd>, PinError> {
    match bpf::get(path) {
        Ok(object) => Ok(Some(object)),
        Err(error) if is_out_of_resources(&error) => Err(io_error("open", path)(error)),
        Err(_) => Ok(None),
    }
}

fn is_out_of_resources(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM))
}

fn read_array<V: aya::Pod>(
    pins: &PinDir,
    name: &'static str,
) -> Result<Option<ArrayContent<V>>, ObjectError> {
    if !pins.map(name).exists() {
        return Ok(None);
    }
    let array: Array<MapData, V> = object::open_map(pins, name, Map::Array)?;
    let value = bpf::first_element(&array).map_err(|source| ObjectError::Map { name, source })?;
    Ok(Some((array, value)))
}

fn read_endpoints(pins: &PinDir) -> Result<Option<EndpointContent>, ObjectError> {
    if !pins.map(MAP_ENDPOINTS).exists() {
        return Ok(None);
    }
    let map: HashMap<MapData, Address, Endpoint> = object::open_map(pins, MAP_ENDPOINTS, Map::HashMap)?;
    let entries = object::present(map.iter()).collect::<Result<_, _>>();
    Ok(Some((map, entries.map_err(|source| ObjectError::Map { name: MAP_ENDPOINTS, source })?)))
}

fn restore_array<V: aya::Pod>(
    name: &'static str,
    before: Option<ArrayContent<V>>,
) -> Result<(), DatapathError> {
    let Some((mut array, value)) = before else { return Ok(()) };
    array.set(0, value, 0).map_err(map_error(name))
}

fn restore_endpoints((mut map, before): EndpointContent) -> Result<(), DatapathError> {
    let restored = pinned_maps::sync(&mut map, &before).map(drop);
    restored.map_err(map_error(MAP_ENDPOINTS))
}
