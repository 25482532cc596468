//! The endpoints in the maps: written in an order in which nothing that is guarded is ever let through.

use std::collections::BTreeMap;

use aya::maps::MapError;
use imds_ebpf_common::{
    Address, Endpoint, Filter, ProviderRecord,
    endpoint::MAX_ENDPOINTS,
    names::{MAP_ENDPOINTS, MAP_FILTER, MAP_PROVIDER},
};

use super::{DatapathError, exemptions, object::Maps, pins::PinDir};
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
    let maps = Maps::open(pins).ok();
    let entries = guarded.entries(&maps.as_ref().and_then(|maps| read(maps).ok()).unwrap_or_default());
    let wanted = filter_of(&entries);
    // Without maps, or with unreadable ones, no program is attached that goes by them.
    match maps.and_then(|maps| filter(&maps).ok()) {
        // A number that is new may be one from which somebody is still exempt.
        Some(in_force) => wanted.and_slots_of(&in_force).closed_as_in(&in_force),
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
    let wanted = guarded.entries(&before);
    let filter = filter_of(&wanted);

    let mut unwanted: Vec<_> = before.keys().filter(|address| !wanted.contains_key(address)).collect();
    let unwanted_count = unwanted.len();
    let mut remove_unwanted = |maps: &mut Maps| {
        unwanted.drain(..).try_for_each(|address| maps.endpoints.remove(address)).map_err(of_endpoints)
    };

    if unwanted_count + wanted.len() > CAPACITY {
        // An agent that was killed in the middle of this left more than its own.
        remove_unwanted(maps)?;
    }
    let is_new = |(address, endpoint): &(&Address, &Endpoint)| {
        before.get(address).is_none_or(|before| before.id != endpoint.id)
    };
    let new = wanted.iter().filter(is_new).map(|(_, endpoint)| endpoint.id);
    // Whoever was exempt from what had such a number before was so from that.
    exemptions::revoke(maps, &new.collect())?;
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
