//! The cgroups of Kubernetes pods, as they come and go.

use std::{
    collections::{BTreeSet, HashMap},
    io, mem,
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};
use tokio::io::{Interest, unix::AsyncFd};

use super::cgroup;

/// What their names have in common: the kubelet makes `kubepods` with its cgroupfs driver and `kubepods.slice` with
/// systemd's, in kind `kubelet-kubepods.slice`.
const NAME: &str = "kubepods";
/// How deep below the root they are looked for: k3s in a container that systemd started has them at 4.
const DEPTH: usize = 5;

/// The cgroups of Kubernetes pods below one cgroup: the topmost of each branch, which stands for all in it.
#[derive(Debug)]
pub struct Kubepods {
    root: PathBuf,
    news: Option<News>,
    found: BTreeSet<PathBuf>,
}

/// What the kernel says of the directories that were searched.
#[derive(Debug)]
struct News {
    inotify: Inotify,
    /// A second descriptor of the same.
    ready: AsyncFd<OwnedFd>,
    watched: HashMap<WatchDescriptor, (PathBuf, usize)>,
    /// Whether there is more than can be watched, so that it is said once.
    is_short: bool,
}

impl Kubepods {
    /// Those below `root`, which was not searched yet.
    #[must_use]
    pub fn new(root: PathBuf) -> Self {
        let news = News::new().inspect_err(|error| {
            log::warn!(
                "can't follow {}: what changes is noticed with the next look at everything: {error}",
                root.display()
            );
        });
        Self { root, news: news.ok(), found: BTreeSet::new() }
    }

    /// The cgroup below which they are looked for.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Paths of those that were there last time.
    #[must_use]
    pub fn found(&self) -> &BTreeSet<PathBuf> {
        &self.found
    }

    /// Waits until something may have changed.
    pub async fn changed(&self) {
        if let Some(news) = &self.news
            && let Ok(mut ready) = news.ready.readable().await
        {
            // Cleared before it is read: what comes while it is read makes it ready again.
            return ready.clear_ready();
        }
        std::future::pending::<()>().await;
    }

    /// Looks at everything. Where that fails, what was found before is taken to be there still.
    pub fn search(&mut self) -> io::Result<()> {
        let mut before = mem::take(&mut self.found);
        let searched = self.look(self.root.clone(), 0);
        if searched.is_err() {
            self.found.append(&mut before);
        }
        searched
    }

    /// Looks at what changed.
    pub fn follow(&mut self) -> io::Result<()> {
        while let Some(events) = self.news.as_ref().map(News::read).transpose()?
            && !events.is_empty()
        {
            for event in events {
                self.take_in(event)?;
            }
        }
        Ok(())
    }

    fn take_in(&mut self, event: InotifyEvent) -> io::Result<()> {
        let Some(news) = &mut self.news else { return Ok(()) };
        if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
            return self.search();
        }
        if event.mask.contains(AddWatchFlags::IN_IGNORED) {
            news.watched.remove(&event.wd);
            return Ok(());
        }
        let (Some(name), Some((parent, depth))) = (event.name, news.watched.get(&event.wd)) else {
            return Ok(());
        };
        let (path, depth) = (parent.join(name), depth + 1);
        if event.mask.contains(AddWatchFlags::IN_DELETE) {
            self.found.remove(&path);
            return Ok(());
        }
        self.look(path, depth)
    }

    /// Looks at `path` and below it. A directory is watched before it is read, so that nothing falls between the two.
    fn look(&mut self, path: PathBuf, depth: usize) -> io::Result<()> {
        let Self { news, found, .. } = self;
        let mut watch = |path: &Path, depth| {
            if let Some(news) = news {
                news.watch(path, depth);
            }
        };
        walk(path, depth, &mut watch, &mut |path| {
            found.insert(path);
        })
    }
}

impl News {
    fn new() -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        let descriptor = inotify.as_fd().try_clone_to_owned()?;
        // SAFETY: an owned descriptor stays what it is until it is dropped, with the registration.
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
                log::warn!("can't follow {}: {errno} (fs.inotify.max_user_watches)", path.display());
            }
        }
    }

    /// What there is; nothing where there is nothing.
    fn read(&self) -> io::Result<Vec<InotifyEvent>> {
        match self.inotify.read_events() {
            Ok(events) => Ok(events),
            Err(nix::errno::Errno::EAGAIN) => Ok(Vec::new()),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// Why there may be none, and what to do.
#[must_use]
pub fn why_none() -> String {
    match in_v1() {
        Some(path) => format!(
            "the kubelet uses cgroup v1 ({}), where programs can't be attached: boot with \
             systemd.unified_cgroup_hierarchy=1, or set hooks.host_network = false",
            path.display()
        ),
        None => "start the kubelet, name the cgroup v2 below which its pods are by --cgroup, or set \
                 hooks.host_network = false"
            .to_owned(),
    }
}

/// A cgroup of Kubernetes pods in a hierarchy of cgroup v1.
fn in_v1() -> Option<PathBuf> {
    cgroup::v1_roots().ok()?.iter().find_map(|root| below(root).ok()?.pop_first())
}

/// The cgroups of Kubernetes pods below `root`, of whatever version of cgroups.
pub fn below(root: &Path) -> io::Result<BTreeSet<PathBuf>> {
    let mut found = BTreeSet::new();
    walk(root.to_owned(), 0, &mut |_, _| {}, &mut |path| {
        found.insert(path);
    })?;
    Ok(found)
}

/// Goes through the directories from `path` on, which is `depth` below the root, and tells of each that is to be `read`
/// and of each that was `found`.
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

/// Whether this is what one hears of a cgroup that was removed meanwhile.
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
        let below_root = kubepods.found().iter().map(|path| path.strip_prefix(kubepods.root()).unwrap());
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
        // In one go: the last is made before its parents are watched.
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
