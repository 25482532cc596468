//! Finds network namespaces by inode number, and the cgroup of a process.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use super::sender_resolver::{NAMED, below, entries, pids, process_namespaces};

/// Returns a path of each of these network namespaces, given by inode number, that has a process or a name.
pub fn paths_of(inodes: &BTreeSet<u64>) -> BTreeMap<u64, PathBuf> {
    let mut found = BTreeMap::new();
    for path in NAMED.into_iter().flat_map(entries).chain(process_namespaces()) {
        if found.len() == inodes.len() {
            break;
        }
        if let Some(inode) = inode_at(&path).filter(|inode| inodes.contains(inode)) {
            found.entry(inode).or_insert(path);
        }
    }
    found
}

/// Returns the inode number of the file at `path`, if it exists.
pub(crate) fn inode_at(path: &Path) -> Option<u64> {
    fs::metadata(path).ok().map(|metadata| metadata.ino())
}

/// Returns the id of the cgroup v2 at or below one of `roots` that contains the process, if there is one.
pub fn cgroup_with<'r>(roots: impl IntoIterator<Item = &'r PathBuf>, pid: u32) -> Option<u64> {
    let mut cgroups = roots.into_iter().flat_map(|root| below(root));
    cgroups.find(|cgroup| pids(&cgroup.join("cgroup.procs")).contains(&pid)).and_then(|path| inode_at(&path))
}
