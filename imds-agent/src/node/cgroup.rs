//! The cgroup v2 hierarchy.

use std::{
    collections::VecDeque,
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

/// Where the root of the cgroup v2 hierarchy is mounted: /sys/fs/cgroup on pure v2 hosts, /sys/fs/cgroup/unified on
/// hybrid ones. `None` where it is not.
pub fn root() -> io::Result<Option<PathBuf>> {
    Ok(find(&fs::read_to_string("/proc/self/mountinfo")?))
}

/// Ids of the cgroup v2 of this process and of those above it, as far as they can be seen.
pub fn ids_of_this_process() -> io::Result<Vec<u64>> {
    let Some(root) = root()? else { return Ok(Vec::new()) };
    let cgroups = fs::read_to_string("/proc/thread-self/cgroup")?;
    let own = cgroups.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    let path = root.join(own);
    let above = path.ancestors().take_while(|path| path.starts_with(&root));
    // The inode number of a cgroup is its id (kernfs).
    above.map(|path| Ok(fs::metadata(path)?.ino())).collect()
}

/// The cgroup v2 with this id, as far as it can be seen.
pub fn path_of(id: u64) -> io::Result<Option<PathBuf>> {
    let mut unseen = VecDeque::from_iter(root()?);
    while let Some(path) = unseen.pop_front() {
        // What is gone meanwhile is not the one.
        if fs::metadata(&path).is_ok_and(|metadata| metadata.ino() == id) {
            return Ok(Some(path));
        }
        unseen.extend(children(&path).unwrap_or_default());
    }
    Ok(None)
}

/// The cgroups right below the one at `path`.
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

/// Where hierarchies of cgroup v1 are mounted.
pub fn v1_roots() -> io::Result<Vec<PathBuf>> {
    Ok(find_v1(&fs::read_to_string("/proc/self/mountinfo")?))
}

fn find_v1(mountinfo: &str) -> Vec<PathBuf> {
    let path = |line: &str| {
        let (mount, kind) = line.split_once(" - ")?;
        let path = mount.split(' ').nth(4)?;
        (kind.split(' ').next()? == "cgroup").then(|| Path::new(path).to_owned())
    };
    mountinfo.lines().filter_map(path).collect()
}

/// The first mount of the whole hierarchy (proc(5): the fourth field is the part of it that is mounted, the fifth where,
/// and behind a lone hyphen the type).
fn find(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, kind) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let (part, path) = (fields.next()?, fields.next()?);
        let is_whole = kind.split(' ').next()? == "cgroup2" && part == "/";
        // Spaces and the like are octal there; no cgroup mount has any.
        is_whole.then(|| Path::new(path).to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_of_pure_hybrid_and_no_v2() {
        let pure = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(find(pure), Some("/sys/fs/cgroup".into()));
        let hybrid = "31 23 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                      32 23 0:28 /a/b /mnt rw - cgroup2 cgroup2 rw\n\
                      33 23 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        assert_eq!(find(hybrid), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!((find_v1(hybrid), find_v1(pure)), (vec!["/sys/fs/cgroup/cpu".into()], vec![]));
        assert_eq!(find("31 23 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"), None);
    }
}
