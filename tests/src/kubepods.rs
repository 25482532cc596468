//! The cgroups that a kubelet makes for pods, in a hierarchy v2 that is part of the machine's.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Child,
};

use crate::{
    Netns,
    cgroup::{remove_all, v2_root},
    netns::unique,
};

pub(crate) const PREFIX: &str = "imds-kubepods-";
/// Of a container.
const ID: &str = "1f0e6d2c9b8a7f6e5d4c3b2a19080706f5e4d3c2b1a09f8e7d6c5b4a39281706";

/// A cgroup that is the root of what a node has. It and all below it is removed on drop.
#[derive(Debug)]
pub struct Kubepods {
    root: PathBuf,
}

impl Kubepods {
    /// Makes the root alone: the kubelet has not been started yet.
    #[must_use]
    #[expect(clippy::new_without_default, reason = "making cgroups is work that its name should show")]
    pub fn new() -> Self {
        // Not below this process's own: there it could be a threaded one, which has no processes.
        let root = v2_root().join(unique(PREFIX));
        fs::create_dir(&root).unwrap_or_else(|error| panic!("make {}: {error}", root.display()));
        Self { root }
    }

    /// Where the hierarchy starts.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Makes the cgroups of a burstable pod with one container, as the cgroupfs driver does, without a process.
    pub fn add_pod(&self, uid: &str) -> PodCgroup {
        let path = self.root.join(format!("kubepods/burstable/pod{uid}"));
        Self::make(&path)
    }

    /// The same, as the systemd driver and containerd do.
    pub fn add_pod_by_systemd(&self, uid: &str) -> PodCgroup {
        let uid = uid.replace('-', "_");
        let path = format!("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{uid}.slice");
        Self::make(&self.root.join(path))
    }

    fn make(path: &Path) -> PodCgroup {
        let is_slice = path.extension().is_some();
        let container = if is_slice { format!("cri-containerd-{ID}.scope") } else { ID.to_owned() };
        let container = path.join(container);
        fs::create_dir_all(&container)
            .unwrap_or_else(|error| panic!("make {}: {error}", container.display()));
        PodCgroup { path: path.to_owned(), container, processes: Vec::new() }
    }
}

impl Drop for Kubepods {
    fn drop(&mut self) {
        remove_all(&self.root);
    }
}

/// The cgroups of a pod. Its processes end on drop, and the cgroups are removed.
#[derive(Debug)]
pub struct PodCgroup {
    /// The pod's.
    pub path: PathBuf,
    /// Its container's.
    pub container: PathBuf,
    processes: Vec<Child>,
}

impl PodCgroup {
    /// Starts a process in this cgroup and in `netns`, and returns its id.
    pub fn start_in(&mut self, netns: &Netns) -> u32 {
        let process = netns.command("sleep").arg("1000").spawn().expect("start a process");
        let pid = process.id();
        self.processes.push(process);
        fs::write(self.container.join("cgroup.procs"), pid.to_string()).expect("enter a cgroup");
        pid
    }

    /// Ends its processes; the cgroups stay.
    pub fn stop(&mut self) {
        for mut process in self.processes.drain(..) {
            process.kill().expect("kill a child");
            process.wait().expect("wait for a child");
        }
    }
}

impl Drop for PodCgroup {
    fn drop(&mut self) {
        self.stop();
        remove_all(&self.path);
    }
}
