//! Reports a bpffs that is mounted only in the mount namespace of the agent.
//!
//! A bpffs that is mounted only in the mount namespace of a container or a service ends with that namespace. Its pins,
//! the links and the enforcement end at the same time.

use std::{fs, os::unix::fs::MetadataExt as _};

use nix::sys::stat::{major, minor};

use super::dir::PinDir;
use crate::node::mounts::read_mountinfo;

/// Problem of a bpffs that is not the node's.
pub const PRIVATE_BPFFS: &str = "the bpffs is mounted only in the mount namespace of the agent: enforcement ends with the container or service";
/// Remedy for [`PRIVATE_BPFFS`], on the node.
pub const PRIVATE_BPFFS_REMEDY: &str =
    "run `mount -t bpf bpf /sys/fs/bpf` on the node, not in the container, then restart the agent";

impl PinDir {
    /// Reports whether the file system of the pins is known not to be mounted where the first process is. In a container with a
    /// pid namespace of its own, that process shows nothing of the node.
    pub fn is_private(&self) -> bool {
        let (Ok(root), Ok(mountinfo)) =
            (fs::metadata(self.root()), read_mountinfo("/proc/1/mountinfo".as_ref()))
        else {
            return false;
        };
        !mountinfo.is_empty() && !has_device(&mountinfo, root.dev())
    }
}

/// Reports whether a file system with this device number is mounted. The number is the third field of a line (proc(5)).
fn has_device(mountinfo: &str, device: u64) -> bool {
    let device = format!("{}:{}", major(device), minor(device));
    mountinfo.lines().any(|line| line.split(' ').nth(2) == Some(device.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_compared_as_a_whole() {
        let mountinfo =
            "31 24 0:27 / /sys/fs/bpf rw,nosuid - bpf bpf rw\n32 24 8:1 / / rw - ext4 /dev/sda1 rw\n";
        assert!(has_device(mountinfo, libc::makedev(0, 27)) && has_device(mountinfo, libc::makedev(8, 1)));
        assert!(!has_device(mountinfo, libc::makedev(0, 2)) && !has_device(mountinfo, libc::makedev(8, 27)));
    }
}
