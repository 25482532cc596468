//! Mount points of a kind of file system.

use std::{
    ffi::OsString,
    fs, io,
    os::unix::ffi::OsStringExt as _,
    path::{Path, PathBuf},
};

/// Returns the mounts of this process, in the format of /proc/self/mountinfo. Replaces bytes that are not UTF-8, which the path of
/// any mount may contain.
pub(crate) fn mountinfo() -> io::Result<String> {
    read_mountinfo("/proc/self/mountinfo".as_ref())
}

/// Returns the content of a file like /proc/self/mountinfo. Replaces bytes that are not UTF-8.
pub(crate) fn read_mountinfo(path: &Path) -> io::Result<String> {
    Ok(String::from_utf8_lossy(&fs::read(path)?).into_owned())
}

/// Returns the mount points of a file system type in a file like /proc/self/mountinfo (proc(5): the fifth field is the mount
/// point, and the type follows a lone hyphen).
pub(crate) fn mount_points(mountinfo: &str, file_system: &str) -> Vec<PathBuf> {
    let mount_point = |line: &str| {
        let (mount, rest) = line.split_once(" - ")?;
        let path = mount.split(' ').nth(4)?;
        (rest.split(' ').next()? == file_system).then(|| unescape(path))
    };
    mountinfo.lines().filter_map(mount_point).collect()
}

/// Returns the path of an escaped field: the kernel writes spaces, tabs, newlines and backslashes as three octal digits.
fn unescape(field: &str) -> PathBuf {
    let escaped = |part: &str| {
        let (octal, rest) = part.split_at_checked(3)?;
        Some([&[u8::from_str_radix(octal, 8).ok()?], rest.as_bytes()].concat())
    };
    let mut parts = field.split('\\');
    let mut path = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        path.extend(escaped(part).unwrap_or_else(|| [b"\\", part.as_bytes()].concat()));
    }
    OsString::from_vec(path).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_with_any_bytes_are_read() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mounts = b"30 23 0:26 / /mnt/\xff rw - tmpfs tmpfs rw\n31 23 0:27 / /mnt/my\\040bpf\\134 rw - bpf bpf rw\n";
        fs::write(file.path(), mounts).unwrap();
        let mountinfo = read_mountinfo(file.path()).unwrap();
        assert_eq!(mount_points(&mountinfo, "bpf"), [Path::new("/mnt/my bpf\\")]);
        assert_eq!(unescape("/a\\0\\999/b"), Path::new("/a\\0\\999/b"));
    }
}
