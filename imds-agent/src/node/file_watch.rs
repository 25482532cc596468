//! Watches a file that may be replaced, be reached through symlinks, or be removed and created again.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    fs, io,
    os::fd::{AsFd as _, AsRawFd, RawFd},
    path::{Component, Path, PathBuf},
};

use nix::{
    errno::Errno,
    sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor},
};
use tokio::io::unix::AsyncFd;

/// Number of symlinks that the kernel follows (`MAXSYMLINKS`, include/linux/namei.h).
const MAX_LINKS: usize = 40;
/// Attempts to watch a path that changes while the watches are added.
const MAX_ATTEMPTS: usize = 10;

/// Watches every directory entry on the path to a file, so that the replacement of any of them is noticed. A
/// `ConfigMap` replaces the symlink `..data`, through which the file's own symlink leads.
#[derive(Debug)]
pub struct FileWatcher {
    path: PathBuf,
    inotify: AsyncFd<Descriptor>,
    watched: BTreeMap<WatchDescriptor, BTreeSet<OsString>>,
}

#[derive(Debug)]
struct Descriptor(Inotify);

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl FileWatcher {
    /// Watches `path`, whether or not it exists. Must be called within a tokio runtime.
    pub fn new(path: &Path) -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        // SAFETY: the descriptor belongs to the inotify instance that is registered with it, which keeps it open and
        // never changes it.
        let inotify = unsafe { AsyncFd::register(Descriptor(inotify)) }?;
        let mut watch = Self { path: std::path::absolute(path)?, inotify, watched: BTreeMap::new() };
        watch.follow()?;
        Ok(watch)
    }

    /// Waits until the file may have been replaced or have other content. Cancel safe.
    pub async fn changed(&mut self) -> io::Result<()> {
        loop {
            let mut ready = self.inotify.readable().await?;
            let events = match ready.get_inner().0.read_events() {
                Ok(events) => events,
                Err(Errno::EAGAIN) => {
                    ready.clear_ready();
                    continue;
                }
                Err(errno) => return Err(errno.into()),
            };
            if events.iter().any(|event| self.concerns(event)) {
                return self.follow();
            }
        }
    }

    fn concerns(&self, event: &InotifyEvent) -> bool {
        if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
            return true;
        }
        // An event without a name concerns the directory itself.
        let is_of = |names: &BTreeSet<OsString>| event.name.as_ref().is_none_or(|name| names.contains(name));
        self.watched.get(&event.wd).is_some_and(is_of)
    }

    /// Watches the entries on the current path to the file, and removes all other watches.
    fn follow(&mut self) -> io::Result<()> {
        let mut entries = entries_on(&self.path);
        for _ in 0..MAX_ATTEMPTS {
            self.watch_only(&entries)?;
            let now = entries_on(&self.path);
            if now == entries {
                break;
            }
            entries = now;
        }
        Ok(())
    }

    fn watch_only(&mut self, entries: &[(PathBuf, OsString)]) -> io::Result<()> {
        let inotify = &self.inotify.get_ref().0;
        let flags = AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_MOVE
            | AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_ATTRIB
            | AddWatchFlags::IN_DELETE_SELF
            | AddWatchFlags::IN_MOVE_SELF
            | AddWatchFlags::IN_ONLYDIR;
        let mut watched: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
        for (directory, name) in entries {
            match inotify.add_watch(directory, flags) {
                Ok(descriptor) => {
                    watched.entry(descriptor).or_default().insert(name.clone());
                }
                // The watch of the parent directory reports its creation.
                Err(Errno::ENOENT | Errno::ENOTDIR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        for &descriptor in self.watched.keys().filter(|descriptor| !watched.contains_key(descriptor)) {
            // Fails if the directory was removed, and the watch with it.
            let _gone = inotify.rm_watch(descriptor);
        }
        self.watched = watched;
        Ok(())
    }
}

/// Returns every directory entry that a lookup of an absolute path visits, following symlinks. A missing entry is
/// treated as a directory, so that the entries after it are returned, too.
fn entries_on(path: &Path) -> Vec<(PathBuf, OsString)> {
    let mut ahead: Vec<_> = parts(path);
    let (mut at, mut entries, mut links) = (PathBuf::from("/"), Vec::new(), 0);
    while let Some(part) = ahead.pop() {
        match part {
            Part::Root => at = PathBuf::from("/"),
            Part::Up => drop(at.pop()),
            Part::Entry(name) => {
                let entry = at.join(&name);
                entries.push((at.clone(), name));
                match fs::read_link(&entry) {
                    Ok(target) if links < MAX_LINKS => {
                        links += 1;
                        ahead.append(&mut parts(&target));
                    }
                    Ok(_) | Err(_) => at = entry,
                }
            }
        }
    }
    entries
}

enum Part {
    Root,
    Up,
    Entry(OsString),
}

/// Returns the components of a path in reverse order.
fn parts(path: &Path) -> Vec<Part> {
    let part = |component| match component {
        Component::RootDir => Some(Part::Root),
        Component::ParentDir => Some(Part::Up),
        Component::Normal(name) => Some(Part::Entry(name.to_owned())),
        Component::CurDir | Component::Prefix(_) => None,
    };
    path.components().rev().filter_map(part).collect()
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::symlink, time::Duration};

    use tokio::time::timeout;

    use super::*;

    fn names(path: &Path, root: &Path) -> Vec<String> {
        let below = entries_on(path).into_iter().map(|(directory, name)| directory.join(name));
        below.filter_map(|entry| Some(entry.strip_prefix(root).ok()?.display().to_string())).collect()
    }

    #[test]
    fn path_resolves_every_symlink() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path().canonicalize().unwrap();
        let file = root.join("imds.toml");
        assert_eq!(names(&file, &root), ["", "imds.toml"]);

        fs::create_dir(root.join("..1")).unwrap();
        fs::write(root.join("..1/imds.toml"), "").unwrap();
        symlink("..1", root.join("..data")).unwrap();
        symlink("..data/imds.toml", &file).unwrap();
        assert_eq!(names(&file, &root), ["", "imds.toml", "..data", "..1", "..1/imds.toml"]);

        symlink("loop", root.join("loop")).unwrap();
        assert!(names(&root.join("loop/imds.toml"), &root).len() < 2 * MAX_LINKS);
    }

    /// Reports whether the watch notices `work`.
    async fn notices(watch: &mut FileWatcher, work: impl FnOnce()) -> bool {
        work();
        let noticed = timeout(Duration::from_secs(5), watch.changed()).await.is_ok();
        // Skip further events of the same change.
        while timeout(Duration::from_millis(20), watch.changed()).await.is_ok() {}
        noticed
    }

    #[tokio::test]
    async fn every_kind_of_file_change_is_noticed() {
        let root = tempfile::tempdir().unwrap();
        let path = |name: &str| root.path().join(name);
        let file = path("dir/imds.toml");
        let mut watch = FileWatcher::new(&file).unwrap();
        let watch = &mut watch;
        assert!(notices(watch, || fs::create_dir(path("dir")).unwrap()).await);
        assert!(notices(watch, || fs::write(&file, "1").unwrap()).await);
        assert!(notices(watch, || fs::write(&file, "2").unwrap()).await);
        fs::write(path("dir/other"), "3").unwrap();
        assert!(timeout(Duration::from_millis(50), watch.changed()).await.is_err());
        assert!(notices(watch, || fs::rename(path("dir/other"), &file).unwrap()).await);
        assert!(notices(watch, || fs::remove_file(&file).unwrap()).await);

        for version in ["1", "2"] {
            fs::create_dir(path(version)).unwrap();
            fs::write(path(version).join("imds.toml"), version).unwrap();
        }
        symlink(path("1"), path("dir/..data")).unwrap();
        assert!(notices(watch, || symlink("..data/imds.toml", &file).unwrap()).await);
        symlink(path("2"), path("dir/..new")).unwrap();
        assert!(notices(watch, || fs::rename(path("dir/..new"), path("dir/..data")).unwrap()).await);
        assert!(notices(watch, || fs::write(path("2/imds.toml"), "4").unwrap()).await);
        fs::write(path("1/imds.toml"), "5").unwrap();
        assert!(timeout(Duration::from_millis(50), watch.changed()).await.is_err());

        assert!(notices(watch, || fs::rename(path("dir"), path("moved")).unwrap()).await);
        assert!(notices(watch, || fs::rename(path("moved"), path("dir")).unwrap()).await);
        assert!(notices(watch, || fs::write(path("2/imds.toml"), "6").unwrap()).await);
    }
}
