//! Programs of the `host_network` hook on the cgroups of Kubernetes pods.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use imds_ebpf_common::names::HOST_LINKS;

use super::{
    cgroup_link::{CgroupChange, CgroupChangeKind},
    cgroup_programs::{self, CgroupHookLinks, HOSTS, ProgramState},
    mprog,
};
use crate::datapath::{
    DatapathError,
    object::Programs,
    pin::dir::{PinDir, PinError},
};

/// Cgroups with links of the `host_network` hook, by path.
#[derive(Debug, Default)]
pub(crate) struct HostNetworkLinks {
    cgroups: BTreeMap<PathBuf, CgroupHookLinks>,
}

impl HostNetworkLinks {
    /// Reconciles the links on the cgroups at these paths, each even if another one fails. Links on other cgroups stay. Returns
    /// the changes.
    pub(crate) fn restore(
        &mut self,
        pins: &PinDir,
        programs: &Programs,
        desired: &BTreeSet<PathBuf>,
    ) -> Result<Vec<CgroupChange>, DatapathError> {
        // Drops cgroups that were removed, also if another cgroup was created at the path.
        self.cgroups.retain(|path, cgroup| desired.contains(path) && cgroup.exists());
        let mut changes = Vec::new();
        let mut failed = None;
        for path in desired {
            let is_new = !self.cgroups.contains_key(path);
            let restored = self.restore_cgroup(pins, programs, path);
            match restored {
                // The cgroup was removed in the meantime.
                _ if !path.exists() => drop(self.cgroups.remove(path)),
                Ok(one) => changes.extend(one.into_iter().map(|change| CgroupChange { is_new, ..change })),
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        failed.map_or(Ok(changes), Err)
    }

    /// Describes the programs that are not attached, or not last.
    pub(crate) fn failures(&self) -> impl Iterator<Item = &str> {
        self.cgroups.values().flat_map(CgroupHookLinks::failures)
    }

    fn restore_cgroup(
        &mut self,
        pins: &PinDir,
        programs: &Programs,
        path: &Path,
    ) -> Result<Vec<CgroupChange>, DatapathError> {
        if !self.cgroups.contains_key(path) {
            self.cgroups.insert(path.to_owned(), CgroupHookLinks::adopt(pins, path, HOSTS)?);
        }
        self.cgroups.get_mut(path).map_or_else(|| Ok(Vec::new()), |cgroup| cgroup.restore(programs, |_| true))
    }

    /// Detaches and unpins the links of all other cgroups, most of which were removed. Returns the changes.
    pub(crate) fn detach_others(&self, pins: &PinDir) -> Result<Vec<CgroupChange>, DatapathError> {
        let open_ids: BTreeSet<u64> = self.cgroups.values().map(CgroupHookLinks::id).collect();
        let mut changes = Vec::new();
        for (id, path) in pinned_links(pins)? {
            if !open_ids.contains(&id) && mprog::detach_pinned(&path)? {
                let text = format!("detached the link at {}, which is no longer in use", path.display());
                changes.push(CgroupChange {
                    is_new: true,
                    ..CgroupChange::new(CgroupChangeKind::Detached, text)
                });
            }
        }
        Ok(changes)
    }
}

/// Detaches and unpins all links of the `host_network` hook. Returns `true` if one was attached.
pub(crate) fn detach_all(pins: &PinDir) -> Result<bool, DatapathError> {
    let mut was_attached = false;
    for (_, path) in pinned_links(pins)? {
        was_attached |= mprog::detach_pinned(&path)?;
    }
    Ok(was_attached)
}

/// Reports whether a link of the `host_network` hook is pinned.
pub(super) fn is_pinned(pins: &PinDir) -> Result<bool, PinError> {
    pinned_links(pins).map(|links| !links.is_empty())
}

/// Inspects the programs of each cgroup with pinned links. Returns their states by cgroup id.
pub fn inspect(pins: &PinDir) -> Result<BTreeMap<u64, Vec<ProgramState>>, PinError> {
    let ids: BTreeSet<u64> = pinned_links(pins)?.into_iter().map(|(id, _)| id).collect();
    Ok(ids.into_iter().map(|id| (id, cgroup_programs::inspect(pins, HOSTS, id))).collect())
}

/// Returns the pinned links of the `host_network` hook, each with the id of its cgroup.
fn pinned_links(pins: &PinDir) -> Result<Vec<(u64, PathBuf)>, PinError> {
    let id_of = |path: &Path| {
        let name = path.file_name()?.to_str()?;
        HOST_LINKS.into_iter().find_map(|link| name.strip_prefix(link)?.strip_prefix('_')?.parse().ok())
    };
    Ok(pins.all_links()?.into_iter().filter_map(|path| Some((id_of(&path)?, path))).collect())
}
