//! Threaded cgroups, so that a test's own threads can be in one while the rest of its process is not.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
};

use nix::unistd::gettid;

use crate::{
    kubepods,
    netns::{is_leftover, unique},
};

const PREFIX: &str = "imds-test-";

/// A cgroup below the one of this process. It is removed on drop.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    pub(crate) fn new() -> Self {
        let path = parent().join(unique(PREFIX));
        fs::create_dir(&path).unwrap_or_else(|error| panic!("make {}: {error}", path.display()));
        fs::write(path.join("cgroup.type"), "threaded").expect("make a cgroup threaded");
        Self { path }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Runs `work` in a thread that is in this cgroup, as are the threads that it starts, and the sockets that they
    /// make.
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

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Fails while a thread is in it; the next process sweeps.
        if let Err(error) = fs::remove_dir(&self.path) {
            eprintln!("{}: {error}", self.path.display());
        }
    }
}

/// Removes the cgroups of processes that no longer exist.
pub(crate) fn sweep() {
    for (parent, prefix) in [(parent(), PREFIX), (v2_root(), kubepods::PREFIX)] {
        let Ok(entries) = fs::read_dir(parent) else { continue };
        for entry in entries.flatten() {
            if entry.file_name().to_str().is_some_and(|name| is_leftover(name, prefix)) {
                // Another process may be sweeping too.
                remove_all(&entry.path());
            }
        }
    }
}

/// Removes a cgroup and those below it, as far as they have no processes.
pub(crate) fn remove_all(cgroup: &Path) {
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_all(&entry.path());
        }
    }
    let _ = fs::remove_dir(cgroup);
}

/// Where the cgroup v2 hierarchy is mounted.
pub(crate) fn v2_root() -> PathBuf {
    ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        .map(PathBuf::from)
        .into_iter()
        .find(|root| root.join("cgroup.procs").exists() && root.join("cgroup.controllers").exists())
        .expect("a cgroup v2 hierarchy")
}

/// The cgroup v2 of this process: only threaded cgroups below it can have its threads.
fn parent() -> PathBuf {
    let cgroups = fs::read_to_string("/proc/self/cgroup").expect("read /proc/self/cgroup");
    let own =
        cgroups.lines().find_map(|line| line.strip_prefix("0::/")).expect("a cgroup v2 of this process");
    v2_root().join(own)
}
