//! Processes of the node that may reach protected endpoints: from the entries of the configuration to the keys of the map.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use imds_ebpf_common::{AllowedKind, AllowedProcess};

use super::cgroup;
use crate::config::NodeProcess;

/// Processes of the node that may reach protected endpoints, with the number of the entry in the configuration, from 1.
pub type AllowedProcesses = BTreeMap<AllowedProcess, u32>;

/// Number of the broker, which is no entry of the configuration.
const BROKER: u32 = 0;

/// The allow list of the node. A cgroup that does not exist yet is found later.
#[derive(Debug, Default)]
pub struct NodeProcesses {
    entries: Vec<NodeProcess>,
    /// Mount point of the hierarchy; `None` until one is found.
    root: Option<PathBuf>,
    /// User of the broker, which asks the endpoints for pods with a scoped exemption.
    pub broker_uid: Option<u32>,
    /// Last result of [`NodeProcesses::resolve`].
    pub resolved: AllowedProcesses,
}

impl NodeProcesses {
    /// Creates the allow list with these entries.
    pub fn new(entries: Vec<NodeProcess>) -> Self {
        Self { entries, ..Self::default() }
    }

    /// Reports whether there are cgroups, which come and go without an event of the kernel.
    pub fn has_cgroups(&self) -> bool {
        self.entries.iter().any(|entry| matches!(entry, NodeProcess::Cgroup(_)))
    }

    /// Returns the keys of the entries that exist, with the number of each entry, from 1.
    pub fn resolve(&mut self) -> &AllowedProcesses {
        self.resolved = self.find();
        &self.resolved
    }

    /// Reports whether a cgroup was created, removed or replaced since the last [`NodeProcesses::resolve`].
    pub fn have_changed(&mut self) -> bool {
        self.find() != self.resolved
    }

    fn find(&mut self) -> AllowedProcesses {
        if self.root.is_none() && self.has_cgroups() {
            self.root = cgroup::root().ok().flatten();
        }
        let key = |(entry, number): (&NodeProcess, u32)| {
            let key = match entry {
                NodeProcess::Uid(uid) => Some(AllowedProcess::new(AllowedKind::Uid, (*uid).into())),
                NodeProcess::Cgroup(path) => {
                    let id = cgroup_id(self.root.as_deref()?, path);
                    id.map(|id| AllowedProcess::new(AllowedKind::Cgroup, id))
                }
            };
            Some((key?, number))
        };
        let broker = self.broker_uid.map(|uid| (AllowedProcess::new(AllowedKind::Uid, uid.into()), BROKER));
        self.entries.iter().zip(1..).filter_map(key).chain(broker).collect()
    }
}

/// Id of the cgroup at a path that begins at the root of the hierarchy: its inode number (kernfs).
fn cgroup_id(root: &Path, path: &str) -> Option<u64> {
    let metadata = fs::metadata(root.join(path.trim_start_matches('/'))).ok()?;
    // The files of a cgroup are not cgroups.
    metadata.is_dir().then(|| metadata.ino())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn systemd_escapes_are_part_of_the_name() {
        let root = tempfile::tempdir().unwrap();
        let path = r"/system.slice/foo\x2dbar.service";
        let escaped = root.path().join(&path[1..]);
        fs::create_dir_all(&escaped).unwrap();
        fs::create_dir_all(root.path().join("system.slice/foo-bar.service")).unwrap();
        assert_eq!(cgroup_id(root.path(), path), Some(fs::metadata(&escaped).unwrap().ino()));
    }

    #[test]
    fn cgroups_that_come_and_go() {
        let root = tempfile::tempdir().unwrap();
        let entries = ["/a/b", "/file"].map(|path| NodeProcess::Cgroup(path.to_owned()));
        let mut processes = NodeProcesses::new([NodeProcess::Uid(7)].into_iter().chain(entries).collect());
        processes.root = Some(root.path().to_owned());
        fs::write(root.path().join("file"), "").unwrap();
        let uid = (AllowedProcess::new(AllowedKind::Uid, 7), 1);
        assert!(processes.has_cgroups());
        assert_eq!(processes.resolve(), &[uid].into());
        assert!(!processes.have_changed());

        let cgroup = root.path().join("a/b");
        fs::create_dir_all(&cgroup).unwrap();
        assert!(processes.have_changed());
        let id = fs::metadata(&cgroup).unwrap().ino();
        let key = (AllowedProcess::new(AllowedKind::Cgroup, id), 2);
        assert_eq!(processes.resolve(), &[uid, key].into());
        assert!(!processes.have_changed());
        fs::remove_dir(&cgroup).unwrap();
        assert!(processes.have_changed());
    }
}
