//! Threaded cgroups: threads of a test can enter one while the rest of the process stays outside.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    thread,
};

use nix::unistd::gettid;

use crate::{
    kubelet,
    netns::{is_leftover, unique},
};

const PREFIX: &str = "imds-test-";
/// Conventional mount point of the cgroup v1 memory controller.
const V1_MEMORY: &str = "/sys/fs/cgroup/memory";

/// A cgroup below the one of this process. Dropping it removes the cgroup.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    /// The cgroup and the ancestors that were created for it.
    made: Vec<PathBuf>,
}

impl Cgroup {
    pub(crate) fn new() -> Self {
        Self::below(&parent(), unique(PREFIX).as_ref())
    }

    /// Creates the cgroup at this path below `parent`, and its missing ancestors.
    pub(crate) fn below(parent: &Path, path: &Path) -> Self {
        let mut made = Vec::new();
        let mut whole = parent.to_owned();
        for name in path {
            whole.push(name);
            if !whole.exists() {
                fs::create_dir(&whole).unwrap_or_else(|error| panic!("make {}: {error}", whole.display()));
                fs::write(whole.join("cgroup.type"), "threaded").expect("make a cgroup threaded");
                made.push(whole.clone());
            }
        }
        Self { path: whole, made }
    }

    /// Returns the cgroup id, which is the inode number (kernfs).
    #[must_use]
    pub fn id(&self) -> u64 {
        fs::metadata(&self.path).expect("inspect a cgroup").ino()
    }

    /// Returns the path of the cgroup's directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Runs `work` on a thread inside this cgroup. Threads and sockets that it creates belong to the cgroup too.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                let threads = self.path.join("cgroup.threads");
                fs::write(threads, gettid().to_string()).expect("enter a cgroup");
                work()
            });
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

/// A cgroup with a memory limit, in the hierarchy (v2 or v1) that has the memory controller. Dropping it removes the
/// cgroup.
#[derive(Debug)]
pub struct MemoryLimit {
    path: PathBuf,
    limit: PathBuf,
}

impl MemoryLimit {
    /// Creates a cgroup without a limit. Returns `None` if no hierarchy has the memory controller.
    #[must_use]
    pub fn new() -> Option<Self> {
        let (v1, v2) = (Path::new(V1_MEMORY), v2_root());
        let controllers = fs::read_to_string(v2.join("cgroup.controllers")).expect("a cgroup v2 hierarchy");
        let (parent, limit) = if controllers.split_whitespace().any(|name| name == "memory") {
            fs::write(v2.join("cgroup.subtree_control"), "+memory").expect("let cgroups limit memory");
            (v2.as_path(), "memory.max")
        } else if v1.join("memory.limit_in_bytes").exists() {
            (v1, "memory.limit_in_bytes")
        } else {
            return None;
        };
        let path = parent.join(unique(PREFIX));
        fs::create_dir(&path).unwrap_or_else(|error| panic!("make {}: {error}", path.display()));
        Some(Self { limit: path.join(limit), path })
    }

    /// Sets the limit in bytes.
    pub fn set(&self, bytes: u64) {
        fs::write(&self.limit, bytes.to_string()).expect("limit memory");
    }

    /// Returns the file that moves processes into the cgroup.
    #[must_use]
    pub fn procs(&self) -> PathBuf {
        self.path.join("cgroup.procs")
    }
}

impl Drop for MemoryLimit {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.path) {
            eprintln!("{}: {error}", self.path.display());
        }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for path in self.made.iter().rev() {
            // Fails while a thread is in the cgroup. The next test process removes it then.
            if let Err(error) = fs::remove_dir(path) {
                eprintln!("{}: {error}", path.display());
            }
        }
    }
}

/// Removes the cgroups of processes that no longer exist.
pub(crate) fn sweep() {
    let limits = PathBuf::from(V1_MEMORY);
    for (parent, prefix) in
        [(parent(), PREFIX), (v2_root(), PREFIX), (limits, PREFIX), (v2_root(), kubelet::PREFIX)]
    {
        for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
            if entry.file_name().to_str().is_some_and(|name| is_leftover(name, prefix)) {
                remove(&entry.path());
            }
        }
    }
}

/// Removes a cgroup and its descendants. Another process may do the same concurrently.
pub(crate) fn remove(path: &Path) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove(&entry.path());
        }
    }
    let _ = fs::remove_dir(path);
}

/// Returns the cgroup v2 of this process. Only threaded cgroups below it can contain threads of the process.
fn parent() -> PathBuf {
    let cgroups = fs::read_to_string("/proc/self/cgroup").expect("read /proc/self/cgroup");
    let own =
        cgroups.lines().find_map(|line| line.strip_prefix("0::/")).expect("a cgroup v2 of this process");
    v2_root().join(own)
}

/// Returns the mount point of the cgroup v2 hierarchy.
pub(crate) fn v2_root() -> PathBuf {
    ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        .map(Path::new)
        .into_iter()
        .find(|root| root.join("cgroup.procs").exists() && root.join("cgroup.controllers").exists())
        .expect("a cgroup v2 hierarchy")
        .to_owned()
}
