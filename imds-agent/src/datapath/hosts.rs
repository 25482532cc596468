//! Strict mode: the hooks of the cgroups of Kubernetes pods, as many as there are.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use imds_ebpf_common::names::HOST_LINKS;
use log::Level;

use super::{
    DatapathError,
    object::Programs,
    pins::{PinDir, PinError},
    sockets::{self, HOSTS, Sockets},
};

/// The cgroups that have their links, by path.
#[derive(Debug, Default)]
pub(super) struct Hosts {
    cgroups: BTreeMap<PathBuf, Sockets>,
}

impl Hosts {
    /// Guards the cgroups at these paths as they should be, each whatever becomes of the others. What is attached to
    /// others stays. Returns what was done, for people.
    pub(super) fn restore(
        &mut self,
        pins: &PinDir,
        programs: &Programs,
        wanted: &BTreeSet<PathBuf>,
    ) -> Result<Vec<(Level, String)>, DatapathError> {
        // By the same path it can be another one now.
        self.cgroups.retain(|path, cgroup| wanted.contains(path) && cgroup.is_there());
        let mut done = Vec::new();
        let mut failed = None;
        for path in wanted {
            let level = if self.cgroups.contains_key(path) { Level::Warn } else { Level::Info };
            match self.restore_one(pins, programs, path) {
                Ok(one) => done.extend(one.into_iter().map(|line| (level, line))),
                // Gone meanwhile.
                Err(_) if !path.exists() => drop(self.cgroups.remove(path)),
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        match failed {
            Some(error) => Err(error),
            None => Ok(done),
        }
    }

    fn restore_one(
        &mut self,
        pins: &PinDir,
        programs: &Programs,
        path: &Path,
    ) -> Result<Vec<String>, DatapathError> {
        if !self.cgroups.contains_key(path) {
            self.cgroups.insert(path.to_owned(), Sockets::adopt(pins, path, HOSTS)?);
        }
        self.cgroups.get_mut(path).map_or_else(|| Ok(Vec::new()), |cgroup| cgroup.restore(pins, programs))
    }

    /// Detaches and unpins the links of all other cgroups, most of which are gone. Returns what was done, for people.
    pub(super) fn forget_others(&self, pins: &PinDir) -> Result<Vec<(Level, String)>, DatapathError> {
        let held: BTreeSet<u64> = self.cgroups.values().map(Sockets::id).collect();
        let mut done = Vec::new();
        for (id, path) in pinned(pins)? {
            if !held.contains(&id) && sockets::detach(&path)? {
                done.push((Level::Info, format!("{}: no longer in use", path.display())));
            }
        }
        Ok(done)
    }
}

/// Detaches and unpins all links. Returns whether one was attached.
pub(super) fn detach_all(pins: &PinDir) -> Result<bool, DatapathError> {
    let mut was_attached = false;
    for (_, path) in pinned(pins)? {
        was_attached |= sockets::detach(&path)?;
    }
    Ok(was_attached)
}

/// The cgroups of which links are pinned, by id, and for each the names of those that are missing: not pinned, or not
/// attached to anything.
pub fn missing(pins: &PinDir) -> Result<BTreeMap<u64, Vec<&'static str>>, PinError> {
    let ids: BTreeSet<u64> = pinned(pins)?.into_iter().map(|(id, _)| id).collect();
    let missing_of = |id| {
        let is_missing = |link: &&str| !sockets::is_attached(&pins.named_link(&format!("{link}_{id}")));
        HOST_LINKS.into_iter().filter(is_missing).collect()
    };
    Ok(ids.into_iter().map(|id| (id, missing_of(id))).collect())
}

/// The pinned links, by the id of the cgroup that each was pinned for.
fn pinned(pins: &PinDir) -> Result<Vec<(u64, PathBuf)>, PinError> {
    let id_of = |path: &Path| {
        let name = path.file_name()?.to_str()?;
        HOST_LINKS.into_iter().find_map(|link| name.strip_prefix(link)?.strip_prefix('_')?.parse().ok())
    };
    Ok(pins.all_links()?.into_iter().filter_map(|path| Some((id_of(&path)?, path))).collect())
}
