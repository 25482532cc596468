//! Mount points of a kind of file system.

use std::path::PathBuf;

/// Returns the mount points of a file system type in a file like /proc/self/mountinfo (proc(5): the fifth field is the mount
/// point, and the type follows a lone hyphen).
pub(crate) fn mount_points(mountinfo: &str, file_system: &str) -> Vec<PathBuf> {
    let mount_point = |line: &str| {
        let (mount, rest) = line.split_once(" - ")?;
        let path = mount.split(' ').nth(4)?;
        (rest.split(' ').next()? == file_system).then(|| path.into())
    };
    mountinfo.lines().filter_map(mount_point).collect()
}
