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

/// What the map says, as far as this process wrote or read it: a map is slow to read, and this is asked for with each news
/// of an interface.
#[derive(Debug, Default)]
pub(super) struct Known(Option<Grants>);

impl Known {
    /// Somebody else may have written it.
    pub(super) fn forget(&mut self) {
        self.0 = None;
    }

    fn get(&mut self, maps: &Maps) -> Result<&mut Grants, DatapathError> {
        match &mut self.0 {
            Some(known) => Ok(known),
            none => Ok(none.insert(read(maps).map_err(of_exemptions)?)),
        }
    }
}

/// Makes `wanted` what is granted: what is taken away goes first. Returns how often a map was written.
pub(super) fn write(maps: &mut Maps, known: &mut Known, wanted: &Grants) -> Result<usize, DatapathError> {
    let known = known.get(maps)?;
    if known.is_empty() && wanted.is_empty() {
        // So it is on most nodes, with each news of an interface.
        return Ok(0);
    }
    let gone: Vec<_> = known.keys().filter(|exemption| !wanted.contains_key(exemption)).copied().collect();
    let mut writes = gone.len();
    for exemption in gone {
        remove(maps, known, &exemption)?;
    }
    // Where there is no room for all, there is for some.
    let mut failed = None;
    for (exemption, grant) in wanted {
        if known.get(exemption) != Some(grant) {
            match maps.exempt.insert(exemption, grant, 0) {
                Ok(()) => {
                    known.insert(*exemption, *grant);
                    writes += 1;
                }
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
pub(super) fn revoke(maps: &mut Maps, known: &mut Known, subject: Subject) -> Result<(), DatapathError> {
    let known = known.get(maps)?;
    let of_subject: Vec<_> = known.keys().filter(|exemption| exemption.subject == subject).copied().collect();
    of_subject.iter().try_for_each(|exemption| remove(maps, known, exemption))
}

fn remove(maps: &mut Maps, known: &mut Grants, exemption: &Exemption) -> Result<(), DatapathError> {
    match maps.exempt.remove(exemption) {
        Ok(()) | Err(MapError::KeyNotFound) => {
            known.remove(exemption);
            Ok(())
        }
        Err(error) => Err(of_exemptions(error)),
    }
}

fn of_exemptions(source: MapError) -> DatapathError {
    DatapathError::Map { map: MAP_EXEMPT, source }
}
