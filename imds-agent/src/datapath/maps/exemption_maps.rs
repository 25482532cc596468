//! Reads and writes the exemptions in the maps. Updates are ordered so that no other sender is exempt in between.

use std::collections::BTreeSet;

use aya::maps::MapError;
use imds_ebpf_common::{
    ExemptionKey, Subject, SubjectKind,
    names::{MAP_EXEMPT, MAP_EXEMPT_SOURCES},
};

use super::endpoint_maps;
use crate::datapath::{
    Datapath, DatapathError,
    exemption_set::ExemptionSet,
    map_error,
    object::{self, Maps},
};

/// Reads the exemptions and their source addresses.
pub fn read(maps: &Maps) -> Result<ExemptionSet, MapError> {
    let entries = object::present(maps.exempt.iter()).collect::<Result<_, _>>()?;
    let sources = object::present(maps.exempt_sources.keys()).collect::<Result<_, _>>()?;
    Ok(ExemptionSet { entries, sources })
}

impl Datapath {
    /// Reads all exemptions from the map.
    pub fn exemptions(&self) -> Result<ExemptionSet, DatapathError> {
        read(&self.maps).map_err(map_error(MAP_EXEMPT))
    }

    /// Drops the cached exemptions, so that the next [`Datapath::sync_exemptions`] reads the map and corrects changes of
    /// other programs.
    pub fn invalidate_exemptions(&mut self) {
        self.known_exemptions = None;
    }

    /// Replaces all exemptions. Obsolete ones are removed first. Returns the number of map updates.
    pub fn sync_exemptions(&mut self, desired: &ExemptionSet) -> Result<usize, DatapathError> {
        let Self { maps, known_exemptions, .. } = self;
        let known = get_or_read(known_exemptions, maps)?;
        if known == desired {
            // Fast path: most link events change no exemption.
            return Ok(0);
        }
        let is_obsolete = |exemption: &&ExemptionKey| !desired.entries.contains_key(exemption);
        let obsolete: Vec<_> = known.entries.keys().filter(is_obsolete).copied().collect();
        let mut writes = obsolete.len();
        for exemption in obsolete {
            remove(maps, known, &exemption)?;
        }
        // If the map of source addresses is full, still writes exemptions to the map that has room.
        let failed_sources = write_sources(maps, known, &desired.sources, &mut writes).err();
        let mut failed = failed_sources.map(map_error(MAP_EXEMPT_SOURCES));
        for (exemption, record) in &desired.entries {
            if known.entries.get(exemption) != Some(record) {
                match maps.exempt.insert(exemption, record, 0) {
                    Ok(()) => {
                        known.entries.insert(*exemption, *record);
                        writes += 1;
                    }
                    Err(error) => failed = Some(map_error(MAP_EXEMPT)(error)),
                }
            }
        }
        // One write replaces the bitmap, so that subjects that stay exempt are always in it.
        let effective = endpoint_maps::filter(maps)?;
        let mut filter = effective.clone();
        filter.set_subjects(desired.entries.keys().map(|exemption| exemption.subject));
        if filter.subjects != effective.subjects {
            endpoint_maps::set_filter(maps, &filter)?;
            writes += 1;
        }
        failed.map_or(Ok(writes), Err)
    }

    /// Removes the exemptions of an interface.
    pub fn remove_exemptions(&mut self, ifindex: u32) -> Result<(), DatapathError> {
        let subject = Subject::new(SubjectKind::Interface, ifindex.into());
        let Self { maps, known_exemptions, .. } = self;
        let known = get_or_read(known_exemptions, maps)?;
        let is_of_subject = |exemption: &&ExemptionKey| exemption.subject == subject;
        let of_subject: Vec<_> = known.entries.keys().filter(is_of_subject).copied().collect();
        of_subject.iter().try_for_each(|exemption| remove(maps, known, exemption))
    }
}

/// Returns the cached content of the maps, because reading a map is slow and each link event needs the content.
fn get_or_read<'k>(
    known: &'k mut Option<ExemptionSet>,
    maps: &Maps,
) -> Result<&'k mut ExemptionSet, DatapathError> {
    match known {
        Some(known) => Ok(known),
        none => Ok(none.insert(read(maps).map_err(map_error(MAP_EXEMPT))?)),
    }
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

fn remove(maps: &mut Maps, known: &mut ExemptionSet, exemption: &ExemptionKey) -> Result<(), DatapathError> {
    object::removed(maps.exempt.remove(exemption)).map_err(map_error(MAP_EXEMPT))?;
    known.entries.remove(exemption);
    Ok(())
}
