//! Cgroups of Kubernetes pods (`kubepods`), and inotify watches that report when they are created or removed.

use std::{
    collections::{BTreeSet, HashMap},
    io, mem,
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};
use tokio::io::{Interest, unix::AsyncFd};

use super::cgroup;

/// Common part of the names: the kubelet creates `kubepods` with its cgroupfs driver, `kubepods.slice` with the systemd
/// driver, and `kubelet-kubepods.slice` in kind.
const NAME: &str = "kubepods";
/// Depth of the search below the root. k3s in a container that systemd started has the cgroups at depth 4.
const DEPTH: usize = 5;

/// Cgroups of Kubernetes pods below a root cgroup: the topmost one of each branch, which contains all others.
#[derive(Debug)]
pub struct Kubepods {
    /// Root of the search.
    pub root: PathBuf,
    watcher: Option<CgroupWatcher>,
    /// Cgroups found so far.
    pub found: BTreeSet<PathBuf>,
}

/// Inotify watches of the searched directories.
#[derive(Debug)]
struct CgroupWatcher {
    inotify: Inotify,
    /// Duplicate of the inotify descriptor, registered with tokio.
    ready: AsyncFd<OwnedFd>,
    watched: HashMap<WatchDescriptor, (PathBuf, usize)>,
    /// True once the limit of watches was reached, so that this is logged once.
    is_short: bool,
}

impl Kubepods {
    /// Creates the set for `root`, without searching it.
    pub fn new(root: PathBuf) -> Self {
        let watcher = CgroupWatcher::new().inspect_err(|error| {
            log::warn!("failed to watch {}, the resync finds changes: {error}", root.display());
        });
        Self { root, watcher: watcher.ok(), found: BTreeSet::new() }
    }

    /// Waits until the cgroups may have changed.
    pub async fn changed(&self) {
        if let Some(watcher) = &self.watcher
            && let Ok(mut ready) = watcher.ready.readable().await
        {
            // Clear before reading: an event that arrives during the read then makes it ready again.
            return ready.clear_ready();
        }
        std::future::pending::<()>().await;
    }

    /// Searches all directories. If that fails, the cgroups found before are kept.
    pub fn search(&mut self) -> io::Result<()> {
        let mut before = mem::take(&mut self.found);
        let searched = self.scan(self.root.clone(), 0);
        if searched.is_err() {
            self.found.append(&mut before);
        }
        searched
    }

    /// Applies the pending inotify events.
    pub fn follow(&mut self) -> io::Result<()> {
        while let Some(events) = self.watcher.as_ref().map(CgroupWatcher::read).transpose()?
            && !events.is_empty()
        {
            for event in events {
                self.apply_event(event)?;
            }
        }
        Ok(())
    }

    fn apply_event(&mut self, event: InotifyEvent) -> io::Result<()> {
        let Some(watcher) = &mut self.watcher else { return Ok(()) };
        if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
            return self.search();
        }
        if event.mask.contains(AddWatchFlags::IN_IGNORED) {
            watcher.watched.remove(&event.wd);
            return Ok(());
        }
        let (Some(name), Some((parent, depth))) = (event.name, watcher.watched.get(&event.wd)) else {
            return Ok(());
        };
        let (path, depth) = (parent.join(name), depth + 1);
        if event.mask.contains(AddWatchFlags::IN_DELETE) {
            self.found.remove(&path);
            return Ok(());
        }
        self.scan(path, depth)
    }

    /// Searches `path` and below. Each directory is watched before it is read, so that no change is missed in between.
    fn scan(&mut self, path: PathBuf, depth: usize) -> io::Result<()> {
        let Self { watcher, found, .. } = self;
        let mut watch = |path: &Path, depth| {
            if let Some(watcher) = watcher {
                watcher.watch(path, depth);
            }
        };
        walk(path, depth, &mut watch, &mut |path| {
            found.insert(path);
        })
    }
}

impl CgroupWatcher {
    fn new() -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        let descriptor = inotify.as_fd().try_clone_to_owned()?;
        // SAFETY: an owned descriptor stays open and unchanged until it is dropped, which also ends the registration.
        let ready = unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) }?;
        Ok(Self { inotify, ready, watched: HashMap::new(), is_short: false })
    }

    fn watch(&mut self, path: &Path, depth: usize) {
        let flags = AddWatchFlags::IN_CREATE | AddWatchFlags::IN_DELETE | AddWatchFlags::IN_ONLYDIR;
        match self.inotify.add_watch(path, flags) {
            Ok(watch) => drop(self.watched.insert(watch, (path.to_owned(), depth))),
            Err(errno) if is_gone(&errno.into()) || self.is_short => {}
            Err(errno) => {
                self.is_short = true;
                log::warn!("failed to watch {}: {errno} (fs.inotify.max_user_watches)", path.display());
            }
        }
    }

    /// Returns the pending events without waiting.
    fn read(&self) -> io::Result<Vec<InotifyEvent>> {
        match self.inotify.read_events() {
            Ok(events) => Ok(events),
            Err(nix::errno::Errno::EAGAIN) => Ok(Vec::new()),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// Returns a hint why no cgroup of Kubernetes pods was found, and how to fix it.
pub fn missing_kubepods_hint() -> String {
    match in_v1() {
        Some(path) => format!(
            "the kubelet uses cgroup v1 ({}), to which programs cannot be attached: boot with \
             systemd.unified_cgroup_hierarchy=1, or set hooks.host_network = false",
            path.display()
        ),
        None => "start the kubelet, set --cgroup to the cgroup v2 above its pods, or set \
                 hooks.host_network = false"
            .to_owned(),
    }
}

/// Returns a cgroup of Kubernetes pods in a cgroup v1 hierarchy.
fn in_v1() -> Option<PathBuf> {
    cgroup::v1_roots().ok()?.iter().find_map(|root| below(root).ok()?.pop_first())
}

/// Returns the cgroups of Kubernetes pods below `root`, for either version of cgroups.
pub fn below(root: &Path) -> io::Result<BTreeSet<PathBuf>> {
    let mut found = BTreeSet::new();
    walk(root.to_owned(), 0, &mut |_, _| {}, &mut |path| {
        found.insert(path);
    })?;
    Ok(found)
}

/// Reports whether the path of a cgroup is that of a Kubernetes pod or container.
pub fn contains(path: &Path) -> bool {
    path.iter().any(|name| name.to_string_lossy().contains(NAME))
}

/// Walks the directories from `path` down, which is `depth` levels below the root. Calls `read` before reading a
/// directory, and `found` for each cgroup of Kubernetes pods.
fn walk(
    path: PathBuf,
    depth: usize,
    read: &mut impl FnMut(&Path, usize),
    found: &mut impl FnMut(PathBuf),
) -> io::Result<()> {
    let mut open = vec![(path, depth)];
    while let Some((path, depth)) = open.pop() {
        if path.file_name().is_some_and(|name| name.to_string_lossy().contains(NAME)) {
            found(path);
            continue;
        }
        if depth == DEPTH {
            continue;
        }
        read(&path, depth);
        match cgroup::children(&path) {
            Ok(children) => open.extend(children.into_iter().map(|path| (path, depth + 1))),
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Reports whether an error means that the cgroup was removed in the meantime.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::ENOTDIR))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn make(root: &Path, paths: &[&str]) {
        for path in paths {
            fs::create_dir_all(root.join(path)).unwrap();
        }
    }

    fn found(kubepods: &Kubepods) -> Vec<&str> {
        let below_root = kubepods.found.iter().map(|path| path.strip_prefix(&kubepods.root).unwrap());
        below_root.map(|path| path.to_str().unwrap()).collect()
    }

    #[tokio::test]
    async fn topmost_cgroups_are_found() {
        let root = tempfile::tempdir().unwrap();
        make(
            root.path(),
            &[
                "kubepods/besteffort/podkubepods",
                "kubepods.slice/kubepods-burstable.slice",
                "docker/0123/kubelet/kubepods/burstable",
                "system.slice/kind.scope/kubelet.slice/kubelet-kubepods.slice",
                "system.slice/containerd.service",
                "a/b/c/d/e/kubepods",
            ],
        );
        fs::write(root.path().join("kubepods.max"), "").unwrap();
        let mut kubepods = Kubepods::new(root.path().to_owned());
        kubepods.search().unwrap();
        let expected = [
            "docker/0123/kubelet/kubepods",
            "kubepods",
            "kubepods.slice",
            "system.slice/kind.scope/kubelet.slice/kubelet-kubepods.slice",
        ];
        assert_eq!(found(&kubepods), expected);
    }

    #[tokio::test]
    async fn added_and_removed_cgroups_are_reported() {
        let root = tempfile::tempdir().unwrap();
        let mut kubepods = Kubepods::new(root.path().to_owned());
        kubepods.search().unwrap();
        assert_eq!(found(&kubepods), [""; 0]);
        // Created at once: the child exists before its parent is watched.
        make(root.path(), &["kubelet.slice/kubelet-kubepods.slice"]);
        kubepods.changed().await;
        kubepods.follow().unwrap();
        assert_eq!(found(&kubepods), ["kubelet.slice/kubelet-kubepods.slice"]);
        make(root.path(), &["kubelet.slice/kubepods"]);
        kubepods.changed().await;
        kubepods.follow().unwrap();
        assert_eq!(found(&kubepods), ["kubelet.slice/kubelet-kubepods.slice", "kubelet.slice/kubepods"]);
        fs::remove_dir_all(root.path().join("kubelet.slice")).unwrap();
        kubepods.changed().await;
        kubepods.follow().unwrap();
        assert_eq!(found(&kubepods), [""; 0]);
    }
}
