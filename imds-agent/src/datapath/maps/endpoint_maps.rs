//! Reads and writes the protected endpoints in the maps. Updates are ordered so that no request to them passes in between.

use std::collections::BTreeMap;

use aya::maps::MapError;
use imds_ebpf_common::{
    Address, Endpoint, PolicyFilter, ProviderRecord,
    names::{MAP_ENDPOINTS, MAP_FILTER, MAP_PROVIDER},
};

use crate::{
    config::endpoint_set::{Endpoint as ProtectedEndpoint, EndpointSet},
    datapath::{
        DatapathError, map_error,
        maps::pinned_maps,
        object::{self, Maps},
        sys::bpf,
    },
    encode::{field_text, name_field},
};

/// Reads the protected endpoints, in the order of the configuration.
pub(crate) fn read(maps: &Maps) -> Result<Vec<ProtectedEndpoint>, MapError> {
    let mut entries = object::present(maps.endpoints.iter()).collect::<Result<Vec<_>, _>>()?;
    entries.sort_by_key(|(_, entry)| entry.id);
    Ok(entries.iter().map(|(address, entry)| ProtectedEndpoint::from_entry(*address, entry)).collect())
}

/// Reads the configured provider, and the provider of the effective preset.
pub fn provider(maps: &Maps) -> Result<(String, String), MapError> {
    let ProviderRecord { configured, effective } = maps.provider.get(&0, 0)?;
    Ok((field_text(&configured), field_text(&effective)))
}

/// Reads the effective filter.
pub(crate) fn filter(maps: &Maps) -> Result<Box<PolicyFilter>, DatapathError> {
    bpf::first_element(&maps.filter).map_err(map_error(MAP_FILTER))
}

/// Replaces the effective filter.
pub(crate) fn set_filter(maps: &mut Maps, filter: &PolicyFilter) -> Result<(), DatapathError> {
    maps.filter.set(0, filter, 0).map_err(map_error(MAP_FILTER))
}

/// Returns the filter to load the programs with: the effective one, with the address bits of the new endpoints added.
pub(crate) fn filter_while_loading(
    effective: Option<&PolicyFilter>,
    endpoint_set: &EndpointSet,
) -> Box<PolicyFilter> {
    let entries: BTreeMap<_, _> = endpoint_set.entries().collect();
    let desired = Box::new(PolicyFilter::new(by_address(&entries)));
    let Some(effective) = effective else { return desired };
    let mut filter = Box::new(*effective);
    filter.add_addresses(&desired);
    filter
}

fn by_address(entries: &BTreeMap<Address, Endpoint>) -> impl Iterator<Item = (Address, &Endpoint)> + Clone {
    entries.iter().map(|(address, endpoint)| (*address, endpoint))
}

/// Replaces the protected endpoints by `endpoint_set`. The programs see the change of all endpoints at once.
pub fn write(maps: &mut Maps, endpoint_set: &EndpointSet) -> Result<(), DatapathError> {
    let desired: BTreeMap<_, _> = endpoint_set.entries().collect();
    write_filter(maps, &desired)?;
    // `status` and `bpftool` read the records.
    let written = pinned_maps::sync(&mut maps.endpoints, &desired);
    written.map_err(map_error(MAP_ENDPOINTS))?;
    let (configured, effective) = (name_field(endpoint_set.configured), name_field(endpoint_set.provider));
    let record = ProviderRecord { configured, effective };
    maps.provider.set(0, record, 0).map_err(map_error(MAP_PROVIDER))
}

/// Writes the unused table of the filter, then makes it the effective one.
fn write_filter(maps: &mut Maps, desired: &BTreeMap<Address, Endpoint>) -> Result<(), DatapathError> {
    let before = filter(maps)?;
    let mut after = before.clone();
    after.set_endpoints(by_address(desired));
    if after.table() == before.table() && after.addresses == before.addresses {
        return Ok(());
    }
    let mut staged = after.clone();
    staged.current = before.current;
    staged.add_addresses(&before);
    set_filter(maps, &staged)?;
    staged.current = after.current;
    set_filter(maps, &staged)?;
    // The next change overwrites the previous table, which running programs may still read.
    bpf::wait_for_programs();
    set_filter(maps, &after)
}
