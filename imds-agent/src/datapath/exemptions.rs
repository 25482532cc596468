//! Who is exempt, in the map: written in an order in which nobody is exempt for a moment who should not be.

use std::collections::BTreeMap;

use aya::maps::MapError;
use imds_ebpf_common::{
    EndpointSet, Exemption, Policy, Subject,
    names::{MAP_EXEMPT, MAP_POLICY},
};

use super::{DatapathError, object::Maps};

/// What each subject is granted.
pub fn read(maps: &Maps) -> Result<BTreeMap<Subject, Exemption>, MapError> {
    let mut exemptions = BTreeMap::new();
    for entry in &maps.exempt {
        match entry {
            Ok((subject, exemption)) => {
                exemptions.insert(subject, exemption);
            }
            // Removed while we looked.
            Err(MapError::KeyNotFound) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(exemptions)
}

/// How many subjects there are, as [`Policy::exemptions`] has it.
pub(super) fn count(maps: &Maps) -> Result<u32, DatapathError> {
    let exemptions = read(maps).map_err(of_exemptions)?;
    Ok(u32::try_from(exemptions.len()).unwrap_or(u32::MAX))
}

/// Takes from everybody what is granted to them of these endpoints.
pub(super) fn revoke(maps: &mut Maps, endpoints: &EndpointSet) -> Result<(), DatapathError> {
    for (subject, exemption) in read(maps).map_err(of_exemptions)? {
        let rest = exemption.without(endpoints);
        if rest.is_none() {
            remove(maps, &subject)?;
        } else if rest != exemption {
            maps.exempt.insert(subject, rest, 0).map_err(of_exemptions)?;
        }
    }
    Ok(())
}

/// Makes `wanted` what is granted: what is taken away goes first.
pub(super) fn write(maps: &mut Maps, wanted: &BTreeMap<Subject, Exemption>) -> Result<(), DatapathError> {
    let before = read(maps).map_err(of_exemptions)?;
    for subject in before.keys().filter(|subject| !wanted.contains_key(subject)) {
        remove(maps, subject)?;
    }
    for (subject, exemption) in wanted {
        if before.get(subject) != Some(exemption) {
            maps.exempt.insert(subject, exemption, 0).map_err(of_exemptions)?;
        }
    }
    update_policy(maps)
}

/// Takes from `subject` all that is granted to it. Returns whether there was something.
pub(super) fn remove(maps: &mut Maps, subject: &Subject) -> Result<bool, DatapathError> {
    match maps.exempt.remove(subject) {
        Ok(()) => Ok(true),
        Err(MapError::KeyNotFound) => Ok(false),
        Err(error) => Err(of_exemptions(error)),
    }
}

/// Lets the programs look for exemptions only where there are any.
fn update_policy(maps: &mut Maps) -> Result<(), DatapathError> {
    let of_policy = |source| DatapathError::Map { map: MAP_POLICY, source };
    let exemptions = count(maps)?;
    let policy: Policy = maps.policy.get(&0, 0).map_err(of_policy)?;
    if policy.exemptions != exemptions {
        maps.policy.set(0, Policy { exemptions, ..policy }, 0).map_err(of_policy)?;
    }
    Ok(())
}

fn of_exemptions(source: MapError) -> DatapathError {
    DatapathError::Map { map: MAP_EXEMPT, source }
}
