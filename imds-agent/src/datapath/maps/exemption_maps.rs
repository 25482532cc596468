//! Reads and writes the exemptions in the maps. Updates are ordered so that no other sender is exempt in between.

use std::collections::BTreeSet;

use aya::maps::MapError;
use imds_ebpf_common::{
    Exemption, Subject,
    names::{MAP_EXEMPT, MAP_EXEMPT_SOURCES},
};

use super::endpoint_maps;
use crate::datapath::{
    DatapathError,
    grants::Grants,
    object::{self, Maps},
};

/// Reads the grants and their source addresses.
pub fn read(maps: &Maps) -> Result<Grants, MapError> {
    let entries = object::present(maps.exempt.iter()).collect::<Result<_, _>>()?;
    let sources = object::present(maps.exempt_sources.keys()).collect::<Result<_, _>>()?;
    Ok(Grants { entries, sources })
}

/// Cache of the content of the maps, because reading a map is slow and each link event needs the content.
#[derive(Debug, Default)]
pub(crate) struct Known(Option<Grants>);

impl Known {
    /// Discards the cache, because another process may have written the maps.
    pub(crate) fn forget(&mut self) {
        self.0 = None;
    }

    fn get(&mut self, maps: &Maps) -> Result<&mut Grants, DatapathError> {
        match &mut self.0 {
            Some(known) => Ok(known),
            none => Ok(none.insert(read(maps).map_err(of_exemptions)?)),
        }
    }
}

/// Writes the `desired` grants. Obsolete ones are removed first. Returns the number of map updates.
pub(crate) fn write(maps: &mut Maps, known: &mut Known, desired: &Grants) -> Result<usize, DatapathError> {
    let known = known.get(maps)?;
    if known == desired {
        // Fast path: most link events change no exemption.
        return Ok(0);
    }
    let obsolete: Vec<_> =
        known.entries.keys().filter(|exemption| !desired.entries.contains_key(exemption)).copied().collect();
    let mut writes = obsolete.len();
    for exemption in obsolete {
        remove(maps, known, &exemption)?;
    }
    // If the map of source addresses is full, still writes grants to the map that has room.
    let failed_sources = write_sources(maps, known, &desired.sources, &mut writes).err();
    let mut failed = failed_sources.map(|source| DatapathError::Map { map: MAP_EXEMPT_SOURCES, source });
    for (exemption, grant) in &desired.entries {
        if known.entries.get(exemption) != Some(grant) {
            match maps.exempt.insert(exemption, grant, 0) {
                Ok(()) => {
                    known.entries.insert(*exemption, *grant);
                    writes += 1;
                }
                Err(error) => failed = Some(of_exemptions(error)),
            }
        }
    }
    // One write replaces the bitmap, so that subjects that stay exempt are always in it.
    let effective = endpoint_maps::filter(maps)?;
    let mut filter = effective;
    filter.set_subjects(desired.entries.keys().map(|exemption| exemption.subject));
    if filter.subjects != effective.subjects {
        endpoint_maps::set_filter(maps, &filter)?;
        writes += 1;
    }
    failed.map_or(Ok(writes), Err)
}

/// Writes the source addresses of exempt subjects. Removes obsolete ones first. Continues after a failed insertion.
fn write_sources(
    maps: &mut Maps,
    known: &mut Grants,
    desired: &BTreeSet<Exemption>,
    writes: &mut usize,
) -> Result<(), MapError> {
    let obsolete: Vec<_> = known.sources.difference(desired).copied().collect();
    for source in obsolete {
        match maps.exempt_sources.remove(&source) {
            Ok(()) | Err(MapError::KeyNotFound) => drop(known.sources.remove(&source)),
            Err(error) => return Err(error),
        }
        *writes += 1;
    }
    let mut written = Ok(());
    for source in desired {
        if !known.sources.contains(source) {
            match maps.exempt_sources.insert(source, 1, 0) {
                Ok(()) => {
                    known.sources.insert(*source);
                    *writes += 1;
                }
                Err(error) => written = Err(error),
            }
        }
    }
    written
}

/// Removes all grants of `subject`.
pub(crate) fn revoke(maps: &mut Maps, known: &mut Known, subject: Subject) -> Result<(), DatapathError> {
    let known = known.get(maps)?;
    let is_of_subject = |exemption: &&Exemption| exemption.subject == subject;
    let of_subject: Vec<_> = known.entries.keys().filter(is_of_subject).copied().collect();
    of_subject.iter().try_for_each(|exemption| remove(maps, known, exemption))
}

fn remove(maps: &mut Maps, known: &mut Grants, exemption: &Exemption) -> Result<(), DatapathError> {
    match maps.exempt.remove(exemption) {
        Ok(()) | Err(MapError::KeyNotFound) => {
            known.entries.remove(exemption);
            Ok(())
        }
        Err(error) => Err(of_exemptions(error)),
    }
}

fn of_exemptions(source: MapError) -> DatapathError {
    DatapathError::Map { map: MAP_EXEMPT, source }
}
