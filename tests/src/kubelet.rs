//! Cgroups that a kubelet creates for pods, in the machine's cgroup v2 hierarchy.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{self, Child, Command},
    sync::atomic::{AtomicU32, Ordering},
};

use crate::{
    Netns,
    cgroup::{remove, v2_root},
    netns::unique,
    poll::try_poll,
    probe::LONG,
};

pub(crate) const PREFIX: &str = "imds-kubelet-";
/// Example of a container id.
pub const CONTAINER: &str = "1f0e6d2c9b8a7f6e5d4c3b2a19080706f5e4d3c2b1a09f8e7d6c5b4a39281706";

/// A cgroup that contains a kubelet's cgroups. Dropping it removes the whole subtree.
#[derive(Debug)]
pub struct Kubelet {
    root: PathBuf,
}

/// Cgroup driver of the kubelet.
#[derive(Clone, Copy, Debug)]
pub enum Driver {
    /// The kubelet creates the directories itself.
    Cgroupfs,
    /// systemd creates slices and scopes.
    Systemd,
}

impl Kubelet {
    /// Creates the root without pod cgroups, as before the kubelet's first start.
    #[must_use]
    #[expect(clippy::new_without_default, reason = "making cgroups is work that its name should show")]
    pub fn new() -> Self {
        // Not below this process's own cgroup, which may be threaded and could then contain no processes.
        let root = v2_root().join(unique(PREFIX));
        fs::create_dir(&root).unwrap_or_else(|error| panic!("make {}: {error}", root.display()));
        Self { root }
    }

    /// Returns the path of the root cgroup.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Creates the cgroups of a burstable pod with one container and no process.
    #[must_use]
    pub fn add_pod(&self, uid: &str, driver: Driver) -> PodCgroup {
        let (path, container) = match driver {
            Driver::Cgroupfs => (format!("kubepods/burstable/pod{uid}"), CONTAINER.to_owned()),
            Driver::Systemd => {
                let uid = uid.replace('-', "_");
                let slice =
                    format!("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{uid}.slice");
                (slice, format!("cri-containerd-{CONTAINER}.scope"))
            }
        };
        let path = self.root.join(path);
        let container = path.join(container);
        fs::create_dir_all(&container)
            .unwrap_or_else(|error| panic!("make {}: {error}", container.display()));
        PodCgroup { path, container, processes: Vec::new() }
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        remove(&self.root);
    }
}

/// Returns a pod id that is unique on this machine.
#[must_use]
pub fn new_uid() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("{:08x}-1f2e-4d3c-8b4a-{:012x}", process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// The cgroups of a pod. Dropping it ends the processes and removes the cgroups.
#[derive(Debug)]
pub struct PodCgroup {
    /// Path of the pod's cgroup.
    pub path: PathBuf,
    /// Path of the container's cgroup.
    pub container: PathBuf,
    processes: Vec<Child>,
}

impl PodCgroup {
    /// Starts a process in the container's cgroup and in `netns`, and returns its process id.
    pub fn start_in(&mut self, netns: &Netns) -> u32 {
        self.start(netns.command("sleep"))
    }

    /// Starts a process like [`Self::start_in`] with another user id than root's.
    pub fn start_as(&mut self, netns: &Netns, user: u32) -> u32 {
        let mut command = netns.command("setpriv");
        command.args([&format!("--reuid={user}"), "--clear-groups", "sleep"]);
        self.start(command)
    }

    /// Starts a process in the container's cgroup, and returns its process id. `sleep` is a command that ends with `sleep`.
    pub fn start(&mut self, mut sleep: Command) -> u32 {
        let process = sleep.arg("1000").spawn().expect("start a process");
        let pid = process.id();
        self.processes.push(process);
        fs::write(self.container.join("cgroup.procs"), pid.to_string()).expect("enter a cgroup");
        pid
    }

    /// Ends the processes and keeps the cgroups.
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
        remove_when_empty(&self.path);
    }
}

/// Removes a cgroup once it is empty. A process stays in its cgroup for a moment after its end.
fn remove_when_empty(path: &Path) {
    let gone = try_poll(LONG, || {
        remove(path);
        (!path.exists()).then_some(())
    });
    if gone.is_none() {
        eprintln!("failed to remove {}", path.display());
    }
}
