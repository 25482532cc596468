//! Resolves a cgroup id to the path of its unit, which is a sender in the report.
//!
//! A container or a service with a delegated cgroup can create any number of cgroups below its own. All of them count as the
//! unit that root created, so that they can't displace other senders from the report.

use std::{
    collections::HashMap,
    fs,
    os::unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    path::{Path, PathBuf},
    rc::Rc,
    time::{Duration, Instant},
};

use super::budget::thread_cpu_time;
use crate::node::{cgroup, pod_cgroups};

const MAX_CGROUPS: usize = 32_768;
const MAX_DEPTH: usize = 32;
/// Pause after a search, as a multiple of the CPU time that it took: unknown ids cost at most 2 % of one CPU.
const PAUSE: u32 = 50;
const CONTAINER_ID_LEN: usize = 64;

/// Units by cgroup id, from the last search of the hierarchy.
#[derive(Debug)]
pub(super) struct CgroupUnits {
    units: HashMap<u64, Rc<[u8]>>,
    next_search: Instant,
}

/// A cgroup that was found and not searched yet.
struct QueuedCgroup {
    path: PathBuf,
    /// Unit of the cgroup above, if it belongs to one.
    unit: Option<Rc<[u8]>>,
    depth: usize,
}

impl CgroupUnits {
    pub(super) fn new() -> Self {
        Self { units: HashMap::new(), next_search: Instant::now() }
    }

    /// Returns the path of the unit below the root of the hierarchy. Returns an empty path for an unknown cgroup: removed, or
    /// created since the last search if the next one is not due yet.
    pub(super) fn unit(&mut self, id: u64) -> Rc<[u8]> {
        if id != 0 && !self.units.contains_key(&id) && self.next_search <= Instant::now() {
            let start = thread_cpu_time();
            self.scan();
            let used = thread_cpu_time().saturating_sub(start);
            self.next_search = Instant::now() + (used * PAUSE).max(Duration::from_millis(10));
        }
        self.units.get(&id).cloned().unwrap_or_default()
    }

    fn scan(&mut self) {
        self.units.clear();
        let Some(root) = cgroup::root().ok().flatten() else { return };
        let mut found = vec![QueuedCgroup { path: root.clone(), unit: None, depth: 0 }];
        while let Some(QueuedCgroup { path, unit, depth }) = found.pop() {
            // An error means that the cgroup was removed.
            let Ok(metadata) = fs::symlink_metadata(&path) else { continue };
            let below = path.strip_prefix(&root).unwrap_or(&path);
            let own = || Rc::from(below.as_os_str().as_bytes());
            let unit = unit.or_else(|| is_unit(below, metadata.uid()).then(own));
            if self.units.len() >= MAX_CGROUPS {
                return;
            }
            // The inode number of a cgroup is its id (kernfs).
            self.units.insert(metadata.ino(), unit.clone().unwrap_or_else(own));
            // Two links without a cgroup below, one more for each (kernfs).
            if metadata.nlink() > 2 && depth < MAX_DEPTH {
                let children = cgroup::children(&path).unwrap_or_default().into_iter();
                found.extend(children.map(|path| QueuedCgroup {
                    path,
                    unit: unit.clone(),
                    depth: depth + 1,
                }));
            }
        }
    }
}

/// Reports whether a cgroup, whose directory belongs to user `owner`, is the topmost of a pod, a container, a service or a
/// user: nothing below it is a sender of its own.
fn is_unit(path: &Path, owner: u32) -> bool {
    let Some(name) = path.file_name().and_then(|name| name.to_str()) else { return owner != 0 };
    let is_container_id = name.len() == CONTAINER_ID_LEN && name.bytes().all(|byte| byte.is_ascii_hexdigit());
    let (_, suffix) = name.rsplit_once('.').unwrap_or_default();
    let is_systemd_unit = matches!(suffix, "service" | "scope");
    let is_lxc = name.starts_with("lxc.payload.");
    owner != 0 || is_container_id || is_systemd_unit || is_lxc || pod_cgroups::is_pod(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_of_runtimes() {
        let id = "0123456789abcdef".repeat(4);
        for unit in [
            "system.slice/nginx.service",
            "user.slice/user-1000.slice/session-2.scope",
            "lxc.payload.web",
            &format!("docker/{id}"),
            "kubepods/burstable/pod6f1c0e0a-0d0e-4c7c-9b53-0f4b8a3f9a2e",
            "kubepods.slice/kubepods-pod6f1c0e0a_0d0e_4c7c_9b53_0f4b8a3f9a2e.slice",
        ] {
            assert!(is_unit(unit.as_ref(), 0), "{unit}");
        }
        for above in
            ["", "system.slice", "kubepods.slice/kubepods-burstable.slice", "docker", "machine.slice"]
        {
            assert!(!is_unit(above.as_ref(), 0), "{above}");
        }
        assert!(is_unit("user.slice/user-1000.slice".as_ref(), 1000));
    }
}
