//! The endpoints in the maps: written in an order in which nothing that is guarded is ever let through.

use std::collections::BTreeMap;

use aya::maps::MapError;
use imds_ebpf_common::{
    Address, Endpoint, Filter, ProviderRecord,
    endpoint::MAX_ENDPOINTS,
    names::{MAP_ENDPOINTS, MAP_FILTER, MAP_PROVIDER},
};

use super::{DatapathError, object::Maps, pins::PinDir};
use crate::endpoints::{Guarded, padded, unpadded};

/// Room in the map: the old endpoints and the new ones.
const CAPACITY: usize = MAX_ENDPOINTS * 2;

/// What is guarded, by address.
pub fn read(maps: &Maps) -> Result<BTreeMap<Address, Endpoint>, MapError> {
    let mut endpoints = BTreeMap::new();
    for entry in &maps.endpoints {
        match entry {
            Ok((address, endpoint)) => {
                endpoints.insert(address, endpoint);
            }
            // Removed while we looked.
            Err(MapError::KeyNotFound) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(endpoints)
}

/// The provider as it was configured, and the one whose preset is in force.
pub fn provider(maps: &Maps) -> Result<(String, String), MapError> {
    let ProviderRecord { configured, in_force } = maps.provider.get(&0, 0)?;
    Ok((unpadded(&configured), unpadded(&in_force)))
}

/// The filter in force.
pub(super) fn filter(maps: &Maps) -> Result<Filter, DatapathError> {
    maps.filter.get(&0, 0).map_err(|source| DatapathError::Map { map: MAP_FILTER, source })
}

/// What the filter has to match while programs are loaded: all that is guarded and all that will be.
pub(super) fn filter_while_loading(pins: &PinDir, guarded: &Guarded) -> Filter {
    let entries: BTreeMap<_, _> = guarded.entries().collect();
    let wanted = filter_of(&entries);
    // Without maps, or with unreadable ones, no program is attached that goes by them.
    match Maps::open(pins).ok().and_then(|maps| filter(&maps).ok()) {
        Some(in_force) => wanted.and_slots_of(&in_force).with_subjects_of(&in_force),
        None => wanted,
    }
}

fn filter_of(endpoints: &BTreeMap<Address, Endpoint>) -> Filter {
    // The IPv4 ones first, which are asked for most.
    let (v4, v6) = endpoints.iter().partition::<Vec<_>, _>(|(address, _)| address.ipv4().is_some());
    Filter::of(v4.into_iter().chain(v6).map(|(address, endpoint)| (*address, endpoint)))
}

/// Makes `guarded` what is guarded. An address that was guarded and will be is so at every moment between.
pub fn write(maps: &mut Maps, guarded: &Guarded) -> Result<(), DatapathError> {
    let of_endpoints = |source| DatapathError::Map { map: MAP_ENDPOINTS, source };
    let of_filter = |source| DatapathError::Map { map: MAP_FILTER, source };
    let before = read(maps).map_err(of_endpoints)?;
    let wanted: BTreeMap<_, _> = guarded.entries().collect();
    let in_force = maps.filter.get(&0, 0).map_err(of_filter)?;
    let filter = filter_of(&wanted).with_subjects_of(&in_force);

    let mut unwanted: Vec<_> = before.keys().filter(|address| !wanted.contains_key(address)).collect();
    let unwanted_count = unwanted.len();
    let mut remove_unwanted = |maps: &mut Maps| {
        unwanted.drain(..).try_for_each(|address| maps.endpoints.remove(address)).map_err(of_endpoints)
    };

    if unwanted_count + wanted.len() > CAPACITY {
        // An agent that was killed in the middle of this left more than its own.
        remove_unwanted(maps)?;
    }
    for (address, endpoint) in &wanted {
        if before.get(address) != Some(endpoint) {
            maps.endpoints.insert(address, endpoint, 0).map_err(of_endpoints)?;
        }
    }
    // What is closed by now is all in the map, too.
    let union = filter.and_slots_of(&filter_of(&before));
    maps.filter.set(0, union, 0).map_err(of_filter)?;
    remove_unwanted(maps)?;
    maps.filter.set(0, filter, 0).map_err(of_filter)?;

    let (configured, in_force) = (padded(guarded.configured()), padded(guarded.provider()));
    let record = ProviderRecord { configured, in_force };
    maps.provider.set(0, record, 0).map_err(|source| DatapathError::Map { map: MAP_PROVIDER, source })
}
