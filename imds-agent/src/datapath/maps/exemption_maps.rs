//! Reads and writes the exemptions in the maps. Updates are ordered so that no other sender is exempt in between.

use std::collections::BTreeSet;

use aya::maps::MapError;
use imds_ebpf_common::{
    ExemptionKey, Subject,
    names::{MAP_EXEMPT, MAP_EXEMPT_SOURCES},
};

use super::endpoint_maps;
use crate::datapath::{
    DatapathError,
    exemption_set::ExemptionSet,
    object::{self, Maps},
};

/// Reads the exemptions and their source addresses.
pub fn read(maps: &Maps) -> Result<ExemptionSet, MapError> {
    let entries = object::present(maps.exempt.iter()).collect::<Result<_, _>>()?;
    let sources = object::present(maps.exempt_sources.keys()).collect::<Result<_, _>>()?;
    Ok(ExemptionSet { entries, sources })
}

/// Cache of the content of the maps, because reading a map is slow and each link event needs the content.
#[derive(Debug, Default)]
pub(crate) struct ExemptionCache(Option<ExemptionSet>);

impl ExemptionCache {
    /// Discards the cache, because another process may have written the maps.
    pub(crate) fn clear(&mut self) {
        self.0 = None;
    }

    fn get_or_read(&mut self, maps: &Maps) -> Result<&mut ExemptionSet, DatapathError> {
        match &mut self.0 {
            Some(known) => Ok(known),
            none => Ok(none.insert(read(maps).map_err(map_error)?)),
        }
    }
}

/// Writes the `desired` exemptions. Obsolete ones are removed first. Returns the number of map updates.
pub(crate) fn write(
    maps: &mut Maps,
    cache: &mut ExemptionCache,
    desired: &ExemptionSet,
) -> Result<usize, DatapathError> {
    let known = cache.get_or_read(maps)?;
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
    // If the map of source addresses is full, still writes exemptions to the map that has room.
    let failed_sources = write_sources(maps, known, &desired.sources, &mut writes).err();
    let mut failed = failed_sources.map(|source| DatapathError::Map { map: MAP_EXEMPT_SOURCES, source });
    for (exemption, record) in &desired.entries {
        if known.entries.get(exemption) != Some(record) {
            match maps.exempt.insert(exemption, record, 0) {
                Ok(()) => {
                    known.entries.insert(*exemption, *record);
                    writes += 1;
                }
                Err(error) => failed = Some(map_error(error)),
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
    known: &mut ExemptionSet,
    desired: &BTreeSet<ExemptionKey>,
    writes: &mut usize,
) -> Result<(), MapError> {
    let obsolete: Vec<_> = known.sources.difference(desired).copied().collect();
    for source in obsolete {
        object::removed(maps.exempt_sources.remove(&source))?;
        known.sources.remove(&source);
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

/// Removes all exemptions of `subject`.
pub(crate) fn remove_subject(
    maps: &mut Maps,
    cache: &mut ExemptionCache,
    subject: Subject,
) -> Result<(), DatapathError> {
    let known = cache.get_or_read(maps)?;
    let is_of_subject = |exemption: &&ExemptionKey| exemption.subject == subject;
    let of_subject: Vec<_> = known.entries.keys().filter(is_of_subject).copied().collect();
    of_subject.iter().try_for_each(|exemption| remove(maps, known, exemption))
}

fn remove(maps: &mut Maps, known: &mut ExemptionSet, exemption: &ExemptionKey) -> Result<(), DatapathError> {
    object::removed(maps.exempt.remove(exemption)).map_err(map_error)?;
    known.entries.remove(exemption);
    Ok(())
}

fn map_error(source: MapError) -> DatapathError {
    DatapathError::Map { map: MAP_EXEMPT, source }
}
