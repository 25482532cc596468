//! News of the kubelet's cgroups: a sandbox is seen as soon as its first process is in it.

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    io,
    os::fd::{AsFd as _, AsRawFd, RawFd},
    path::{Path, PathBuf},
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor},
};
use tokio::{io::unix::AsyncFd, time::sleep};

use super::kubepods::Tree;

/// What comes within this time of each other is one change: a pod's cgroups are made in a burst.
const DEBOUNCE: Duration = Duration::from_millis(5);

/// Tells when something has changed below the kubelet's cgroups.
#[derive(Debug)]
pub struct KubepodsEvents {
    inotify: AsyncFd<Descriptor>,
    tree: Tree,
    watched: BTreeSet<PathBuf>,
    /// Those of the directories above the kubelet's part.
    above: BTreeSet<WatchDescriptor>,
    /// Whether there may be another such part now.
    is_moved: bool,
    /// Whether there is something that was not told yet.
    is_pending: bool,
    /// Whether the last attempt to watch all directories failed.
    is_deaf: bool,
}

#[derive(Debug)]
struct Descriptor(Inotify);

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl KubepodsEvents {
    /// Starts to listen. Must be called within a tokio runtime. `cgroup` is where the hierarchies are mounted, or the
    /// one of them.
    pub fn new(cgroup: &Path) -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        // SAFETY: the descriptor is the instance's own, stays open as long as it, and is always the same.
        let inotify = unsafe { AsyncFd::register(Descriptor(inotify)) }?;
        let mut events = Self {
            inotify,
            tree: Tree::open(cgroup)?,
            watched: BTreeSet::new(),
            above: BTreeSet::new(),
            is_moved: false,
            is_pending: true,
            is_deaf: false,
        };
        events.watch();
        Ok(events)
    }

    /// Waits until something may have changed since the last call; the first one returns at once. Nothing is lost when
    /// this is cancelled.
    ///
    /// It does not say what: everything is to be looked at anew, so that it does not matter what was missed.
    pub async fn changed(&mut self) -> io::Result<()> {
        while !self.is_pending {
            let mut ready = self.inotify.readable().await?;
            ready.clear_ready();
            self.is_pending = self.read()?;
        }
        sleep(DEBOUNCE).await;
        self.read()?;
        self.watch();
        self.is_pending = false;
        Ok(())
    }

    /// Whether something may change unnoticed: the kernel's limits of watches are reached.
    #[must_use]
    pub fn is_deaf(&self) -> bool {
        self.is_deaf
    }

    /// Takes in what there is to read, and says whether any of it matters.
    fn read(&mut self) -> io::Result<bool> {
        let mut any = false;
        loop {
            let events = match self.inotify.get_ref().0.read_events() {
                Ok(events) => events,
                Err(Errno::EAGAIN) => return Ok(any),
                Err(error) => return Err(error.into()),
            };
            for event in events {
                let is_overflow = event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW);
                self.is_moved |= is_overflow || self.above.contains(&event.wd);
                any |= matters(&event);
            }
        }
    }

    /// Watches every directory that there is to watch. The kernel forgets those that are gone.
    fn watch(&mut self) {
        let mask = AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_MODIFY
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_ONLYDIR;
        self.watched.clear();
        self.above.clear();
        if std::mem::take(&mut self.is_moved) {
            self.tree.find_roots();
        }
        let mut failure = None;
        // What is made in a directory before it is watched is found by looking again.
        loop {
            self.tree.find_roots_if_stale();
            let mut telling = self.tree.telling();
            telling.retain(|(path, _)| !self.watched.contains(path));
            if telling.is_empty() {
                break;
            }
            for (path, is_above) in telling {
                // A directory that is watched already keeps its descriptor.
                match self.inotify.get_ref().0.add_watch(&path, mask) {
                    Ok(descriptor) if is_above => drop(self.above.insert(descriptor)),
                    Ok(_) | Err(Errno::ENOENT | Errno::ENOTDIR) => {}
                    Err(error) => failure = Some(error),
                }
                self.watched.insert(path);
            }
        }
        if let Some(error) = failure
            && !self.is_deaf
        {
            log::warn!(
                "can't watch all pods' cgroups, so that new pods are found late: {error}; see \
                 fs.inotify.max_user_watches"
            );
        }
        self.is_deaf = failure.is_some();
    }
}

/// Whether it is of a cgroup that comes or goes, or of a process: the runtime writes it to a file, or starts it there, and
/// the kernel says that the cgroup has its first (`cgroup.events`) or last.
fn matters(event: &InotifyEvent) -> bool {
    let is_about_processes =
        |name: &OsStr| ["cgroup.procs", "cgroup.events", "tasks"].iter().any(|&told| name == told);
    event.mask.intersects(AddWatchFlags::IN_ISDIR | AddWatchFlags::IN_Q_OVERFLOW)
        || event.name.as_deref().is_some_and(is_about_processes)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tokio::time::timeout;

    use super::*;

    const LONG: Duration = Duration::from_secs(10);

    async fn is_told(events: &mut KubepodsEvents) -> bool {
        timeout(LONG, events.changed()).await.is_ok_and(|changed| changed.is_ok())
    }

    /// Reads what there is, and says whether any of it is told.
    fn would_tell(events: &KubepodsEvents) -> bool {
        events.inotify.get_ref().0.read_events().is_ok_and(|events| events.iter().any(matters))
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_pod_is_told_from_its_first_directory_to_its_last_process() {
        let root = tempfile::tempdir().unwrap();
        for file in ["cgroup.procs", "cgroup.controllers"] {
            fs::write(root.path().join(file), "").unwrap();
        }
        let mut events = KubepodsEvents::new(root.path()).unwrap();
        assert!(is_told(&mut events).await, "the first time");
        assert!(!would_tell(&events));

        let mut path = root.path().to_owned();
        for name in ["kubelet", "kubepods", "burstable", "pod0", "c0"] {
            path.push(name);
            fs::create_dir(&path).unwrap();
            assert!(is_told(&mut events).await, "{name}");
        }
        fs::write(path.join("cpu.max"), "").unwrap();
        assert!(!would_tell(&events));
        fs::write(path.join("cgroup.procs"), "7\n").unwrap();
        assert!(is_told(&mut events).await);
        fs::remove_dir_all(root.path().join("kubelet/kubepods")).unwrap();
        assert!(is_told(&mut events).await);

        // All at once: what is made before it can be watched is found nevertheless.
        let container = root.path().join("kubelet/kubepods/pod1/c1");
        fs::create_dir_all(&container).unwrap();
        assert!(is_told(&mut events).await);
        fs::write(container.join("cgroup.procs"), "8\n").unwrap();
        assert!(is_told(&mut events).await);
        assert!(!events.is_deaf());
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_wait_that_is_given_up_loses_nothing() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("kubepods")).unwrap();
        fs::write(root.path().join("cgroup.procs"), "").unwrap();
        let mut events = KubepodsEvents::new(root.path()).unwrap();
        assert!(is_told(&mut events).await);
        fs::create_dir(root.path().join("kubepods/pod0")).unwrap();
        // Long enough to read it, too short to tell it.
        assert!(timeout(DEBOUNCE / 5, events.changed()).await.is_err());
        assert!(is_told(&mut events).await);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn more_than_the_kernel_queues_is_one_change() {
        let root = tempfile::tempdir().unwrap();
        let pod = root.path().join("kubepods/pod0");
        fs::create_dir_all(&pod).unwrap();
        fs::write(root.path().join("cgroup.procs"), "").unwrap();
        let mut events = KubepodsEvents::new(root.path()).unwrap();
        assert!(is_told(&mut events).await);
        let queue = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap();
        for number in 0..=queue.trim().parse::<u32>().unwrap() / 2 {
            let container = pod.join(number.to_string());
            fs::create_dir(&container).unwrap();
            fs::remove_dir(&container).unwrap();
        }
        assert!(is_told(&mut events).await);
        assert!(!would_tell(&events));
        fs::create_dir(root.path().join("kubepods/pod1")).unwrap();
        assert!(is_told(&mut events).await);
        assert!(events.watched.contains(&root.path().join("kubepods/pod1")));
    }
}
