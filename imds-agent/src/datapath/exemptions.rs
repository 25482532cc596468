//! Who is exempt, in the maps: written in an order in which nobody is exempt for a moment who should not be.

use aya::maps::MapError;
use imds_ebpf_common::{Exemption, Subject, names::MAP_EXEMPT};

use super::{
    DatapathError, endpoints,
    object::{self, Maps},
};
use crate::exempt::Grants;

/// What is granted.
pub fn read(maps: &Maps) -> Result<Grants, MapError> {
    object::present(maps.exempt.iter()).collect()
}

/// Makes `wanted` what is granted: what is taken away goes first. Returns how often a map was written.
pub(super) fn write(maps: &mut Maps, wanted: &Grants) -> Result<usize, DatapathError> {
    let before = read(maps).map_err(of_exemptions)?;
    if before.is_empty() && wanted.is_empty() {
        // So it is on most nodes, with each news of an interface.
        return Ok(0);
    }
    let mut writes = 0;
    for exemption in before.keys().filter(|exemption| !wanted.contains_key(exemption)) {
        remove(maps, exemption)?;
        writes += 1;
    }
    // Where there is no room for all, there is for some.
    let mut failed = None;
    for (exemption, grant) in wanted {
        if before.get(exemption) != Some(grant) {
            match maps.exempt.insert(exemption, grant, 0) {
                Ok(()) => writes += 1,
                Err(error) => failed = Some(error),
            }
        }
    }
    // Those who stay are in it at every moment between.
    let in_force = endpoints::filter(maps)?;
    let mut filter = in_force;
    filter.set_subjects(wanted.keys().map(|exemption| exemption.subject));
    if filter.subjects != in_force.subjects {
        endpoints::set_filter(maps, &filter)?;
        writes += 1;
    }
    failed.map_or(Ok(writes), |error| Err(of_exemptions(error)))
}

/// Takes from `subject` all that is granted to it.
pub(super) fn revoke(maps: &mut Maps, subject: Subject) -> Result<(), DatapathError> {
    let of_subject = |exemption: &Exemption| exemption.subject == subject;
    let granted: Vec<_> = read(maps).map_err(of_exemptions)?.into_keys().filter(of_subject).collect();
    granted.iter().try_for_each(|exemption| remove(maps, exemption))
}

fn remove(maps: &mut Maps, exemption: &Exemption) -> Result<(), DatapathError> {
    match maps.exempt.remove(exemption) {
        Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
        Err(error) => Err(of_exemptions(error)),
    }
}

fn of_exemptions(source: MapError) -> DatapathError {
    DatapathError::Map { map: MAP_EXEMPT, source }
}
