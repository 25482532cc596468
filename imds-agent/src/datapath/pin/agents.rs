//! Search for other agents, and their pin directories, in the same network namespace.

use std::{
    collections::VecDeque,
    fmt, fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use imds_ebpf_common::{Policy, maps::MAP_SCHEMA_VERSION, names::MAP_POLICY};

use super::{dir::PinDir, netns_owner};
use crate::{
    datapath::maps::pinned_maps::pinned_policy,
    node::mounts::{mount_points, mountinfo},
};

/// File system type of a bpffs.
const BPFFS: &str = "bpf";
/// Largest depth of pin directories below the root of a bpffs that the search finds: `imds`, or `imds/blue`.
const MAX_DEPTH: usize = 2;
/// Largest number of directories that the search reads. Other programs may have thousands.
const MAX_DIRECTORIES: usize = 1024;

/// Another agent that runs in this network namespace.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct OtherAgent {
    /// Pid of the agent; `None` if it is not visible in this pid namespace.
    pub pid: Option<i32>,
    /// Pin directory of the agent.
    pub pin_dir: PathBuf,
}

impl fmt::Display for OtherAgent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "another imds-agent ")?;
        if let Some(pid) = self.pid {
            write!(f, "(pid {pid}) ")?;
        }
        write!(f, "runs on this node with pins in {}", self.pin_dir.display())
    }
}

impl OtherAgent {
    /// Returns the consequence, and the commands that stop the other agent.
    pub fn remedy(&self) -> String {
        let stop = self.pid.map(|pid| format!("`kill {pid}`, ")).unwrap_or_default();
        format!(
            "each agent enforces its own configuration; to run only one, stop the other: {stop}then `imds-agent unload \
             --pin-dir {}`",
            self.pin_dir.display()
        )
    }
}

/// Finds the other agents that run in this network namespace, on every mounted bpffs.
pub fn find(own: &PinDir) -> Vec<OtherAgent> {
    let others = other_pin_dirs(own).into_iter();
    // Checks the lock last, because the check takes the lock for a moment.
    let running = others.filter_map(|pins| {
        let holder = pins.lock_owner().ok().flatten()?;
        Some(OtherAgent { pid: holder.pid, pin_dir: pins.root().to_owned() })
    });
    running.collect()
}

/// Returns the other pin directories of this network namespace and this version's map schema, on every mounted bpffs. Their
/// agents may have stopped.
pub fn other_pin_dirs(own: &PinDir) -> Vec<PinDir> {
    let Ok(netns) = netns_owner::this_netns() else { return Vec::new() };
    let inode = |path: &Path| fs::metadata(path).map(|metadata| (metadata.dev(), metadata.ino())).ok();
    let mut seen = vec![inode(own.root())];
    let mut found = Vec::new();
    for root in pin_dirs() {
        let key = inode(&root);
        if seen.contains(&key) {
            continue;
        }
        seen.push(key);
        let Ok(pins) = PinDir::new(&root) else { continue };
        let is_here = |policy: Policy| policy.layout == MAP_SCHEMA_VERSION && policy.netns == netns;
        if pinned_policy(&pins).is_some_and(is_here) {
            found.push(pins);
        }
    }
    found.sort_by(|one, other| one.root().cmp(other.root()));
    found
}

/// Returns the directories with a pinned policy map, on every mounted bpffs.
fn pin_dirs() -> Vec<PathBuf> {
    pin_dirs_below(mount_points(&mountinfo().unwrap_or_default(), BPFFS))
}

/// Searches level by level, so that one directory with many others does not hide those beside it.
fn pin_dirs_below(roots: Vec<PathBuf>) -> Vec<PathBuf> {
    let mut pin_dirs = Vec::new();
    let mut found: VecDeque<_> = roots.into_iter().map(|path| (path, 0)).collect();
    let mut read = 0;
    while let Some((directory, depth)) = found.pop_front() {
        if directory.join("maps").join(MAP_POLICY).exists() {
            pin_dirs.push(directory);
            continue;
        }
        if depth >= MAX_DEPTH || read >= MAX_DIRECTORIES {
            continue;
        }
        read += 1;
        let entries = fs::read_dir(&directory).into_iter().flatten().flatten();
        let below = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        found.extend(below.map(|entry| (entry.path(), depth + 1)));
    }
    pin_dirs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_bpffs_mounts_are_found() {
        let mountinfo = "30 23 0:26 / /sys/fs/bpf rw,nosuid shared:4 - bpf bpf rw,mode=700\n\
                         31 23 0:27 / /sys rw - sysfs sysfs rw\n\
                         32 23 0:28 / /run/cilium/bpffs rw - bpf none rw\n";
        assert_eq!(
            mount_points(mountinfo, BPFFS),
            [Path::new("/sys/fs/bpf"), Path::new("/run/cilium/bpffs")]
        );
    }

    #[test]
    fn many_directories_hide_none() {
        let (first, last) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for number in 0..=MAX_DIRECTORIES {
            fs::create_dir_all(last.path().join(format!("other/{number}"))).unwrap();
        }
        let pin_dir = first.path().join("a/green");
        fs::create_dir_all(pin_dir.join("maps")).unwrap();
        fs::write(pin_dir.join("maps").join(MAP_POLICY), "").unwrap();
        for roots in [[&first, &last], [&last, &first]] {
            let roots = roots.map(|root| root.path().to_owned()).to_vec();
            assert_eq!(pin_dirs_below(roots), [&*pin_dir]);
        }
    }

    #[test]
    fn agents_in_words() {
        let agent = OtherAgent { pid: Some(7), pin_dir: "/sys/fs/bpf/two".into() };
        assert_eq!(
            agent.to_string(),
            "another imds-agent (pid 7) runs on this node with pins in /sys/fs/bpf/two"
        );
        assert!(agent.remedy().contains("`kill 7`") && agent.remedy().contains("--pin-dir /sys/fs/bpf/two"));
    }
}
