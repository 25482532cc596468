//! Cgroup v2 hierarchy of the node.

use std::{
    collections::VecDeque,
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use super::mounts::{mount_points, mountinfo};

/// File system type of cgroup v1.
const V1: &str = "cgroup";
/// Inode number of the initial cgroup namespace (`PROC_CGROUP_INIT_INO`, `include/linux/proc_ns.h`).
const INITIAL_NAMESPACE: u64 = 0xefff_fffb;

/// Returns the mount point of the root of the cgroup v2 hierarchy: /sys/fs/cgroup on pure v2 hosts,
/// /sys/fs/cgroup/unified on hybrid ones. Returns `None` if it is not mounted, or in a container that sees only its own
/// cgroup, which appears to be the root.
pub fn root() -> io::Result<Option<PathBuf>> {
    let Some(Root { path, height }) = find(&mountinfo()?) else {
        return Ok(None);
    };
    let is_container = height == 0
        && fs::metadata("/proc/self/ns/cgroup")?.ino() != INITIAL_NAMESPACE
        && own(&fs::read_to_string("/proc/self/cgroup")?) == Some("");
    Ok((!is_container).then_some(path))
}

/// Returns the ID of the root of the hierarchy; `None` if it is not visible.
pub fn root_id() -> Option<u64> {
    // The inode number of a cgroup is its ID (kernfs).
    fs::metadata(root().ok()??).ok().map(|metadata| metadata.ino())
}

/// Returns an error if the path is not a directory of a cgroup v2 hierarchy.
pub fn ensure_v2(path: &Path) -> io::Result<()> {
    let is_v2 = statfs(path)?.filesystem_type() == CGROUP2_SUPER_MAGIC;
    if is_v2 && fs::metadata(path)?.is_dir() {
        return Ok(());
    }
    Err(io::Error::other("not a directory of a cgroup v2 hierarchy (`mount -t cgroup2` lists them)"))
}

/// Returns the cgroup v2 in a file like /proc/self/cgroup, relative to the root of this process's cgroup namespace.
fn own(cgroups: &str) -> Option<&str> {
    cgroups.lines().find_map(|line| line.strip_prefix("0::/"))
}

/// Returns the path of the cgroup v2 of this thread as `/proc/PID/cgroup` shows it; `None` without cgroup v2.
pub fn path_of_this_process() -> io::Result<Option<String>> {
    let cgroups = fs::read_to_string("/proc/thread-self/cgroup")?;
    Ok(own(&cgroups).map(|path| format!("/{path}")))
}

/// Returns the IDs of the cgroup v2 of this process and of its ancestors, as far as they are visible.
pub fn ids_of_this_process() -> io::Result<Vec<u64>> {
    let Some(root) = root()? else { return Ok(Vec::new()) };
    let cgroups = fs::read_to_string("/proc/thread-self/cgroup")?;
    let path = root.join(own(&cgroups).unwrap_or_default());
    let above = path.ancestors().take_while(|path| path.starts_with(&root));
    above.map(|path| Ok(fs::metadata(path)?.ino())).collect()
}

/// Returns the path of the cgroup v2 with this ID, if it is visible.
pub fn path_of(id: u64) -> io::Result<Option<PathBuf>> {
    let mut unseen = VecDeque::from_iter(root()?);
    while let Some(path) = unseen.pop_front() {
        // A cgroup that was deleted in the meantime does not match.
        if fs::metadata(&path).is_ok_and(|metadata| metadata.ino() == id) {
            return Ok(Some(path));
        }
        unseen.extend(children(&path).unwrap_or_default());
    }
    Ok(None)
}

/// Returns the direct children of the cgroup at `path`.
pub fn children(path: &Path) -> io::Result<Vec<PathBuf>> {
    let mut children = Vec::new();
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            children.push(entry.path());
        }
    }
    Ok(children)
}

/// Returns the mount points of the cgroup v1 hierarchies.
pub fn v1_roots() -> io::Result<Vec<PathBuf>> {
    Ok(mount_points(&mountinfo()?, V1))
}

/// Mount of the hierarchy, or of a part of it that contains the root of this process's cgroup namespace.
#[derive(Debug, Eq, PartialEq)]
struct Root {
    path: PathBuf,
    /// Number of levels between the mounted cgroup and the root of the cgroup namespace.
    height: usize,
}

/// Returns the first mount of the whole hierarchy, or else of the largest part (proc(5): the fourth field is the
/// mounted part, the fifth the mount point, and a lone hyphen precedes the type).
fn find(mountinfo: &str) -> Option<Root> {
    let root = |line: &str| {
        let (mount, kind) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let (part, path) = (fields.next()?, fields.next()?);
        if kind.split(' ').next()? != "cgroup2" {
            return None;
        }
        // Spaces and the like are octal escapes there. No cgroup mount contains any.
        Some(Root { path: path.into(), height: height(part)? })
    };
    // `max_by_key` returns the last of several equal elements.
    mountinfo.lines().rev().filter_map(root).max_by_key(|root| root.height)
}

/// Returns the number of levels from the root of a mounted part of the hierarchy down to the root of the cgroup
/// namespace: 0 for `/`, 2 for `/../..`. Returns `None` if the part is not an ancestor.
fn height(part: &str) -> Option<usize> {
    let mut names = part.strip_prefix('/')?.split('/').filter(|name| !name.is_empty());
    let height = names.clone().count();
    names.all(|name| name == "..").then_some(height)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(path: &str, height: usize) -> Root {
        Root { path: path.into(), height }
    }

    #[test]
    fn cgroup_root_pure_hybrid_and_v1() {
        let pure = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(find(pure), Some(at("/sys/fs/cgroup", 0)));
        let hybrid = "31 23 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                      32 23 0:28 /a/b /mnt rw - cgroup2 cgroup2 rw\n\
                      33 23 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
                      34 23 0:28 / /again rw - cgroup2 cgroup2 rw\n";
        assert_eq!(find(hybrid), Some(at("/sys/fs/cgroup/unified", 0)));
        assert_eq!(
            (mount_points(hybrid, V1), mount_points(pure, V1)),
            (vec!["/sys/fs/cgroup/cpu".into()], vec![])
        );
        assert_eq!(find("31 23 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"), None);
    }

    #[test]
    fn container_prefers_the_node_hierarchy() {
        let container = "40 23 0:26 / /sys/fs/cgroup ro - cgroup2 cgroup ro\n\
                         41 23 0:26 /../../.. /sys/fs/cgroup ro - cgroup2 cgroup2 rw\n\
                         42 23 0:26 /../../other /elsewhere ro - cgroup2 cgroup2 rw\n";
        assert_eq!(find(container), Some(at("/sys/fs/cgroup", 3)));
    }
}
