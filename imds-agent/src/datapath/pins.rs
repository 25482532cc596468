//! The pin directory: where it may be, who holds it, and what is in it.

use std::{
    fs::{self, DirBuilder, File, Permissions},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use imds_ebpf_common::{Edge, names::link_prefix};
use nix::{
    fcntl::{Flock, FlockArg},
    mount::{MsFlags, mount},
    sys::statfs::{FsType, statfs},
};
use thiserror::Error;

use super::bpf;

/// Where a bpffs is by convention, and the only place where the agent mounts one.
const BPFFS: &str = "/sys/fs/bpf";
const BPFFS_MAGIC: FsType = FsType(libc::BPF_FS_MAGIC);
/// Owner only: whoever can open a pin can detach or rewrite it.
const MODE: u32 = 0o700;
/// How long to wait for the lock: `status` holds it for a moment to see whether somebody else does.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);
const LOCK_RETRY: Duration = Duration::from_millis(20);

/// Why a pin directory can't be used.
#[derive(Debug, Error)]
pub enum PinError {
    /// The path is on another file system.
    #[error("{} is not on a bpffs; mount one with `mount -t bpf bpf {}` or choose another --pin-dir", path.display(), mount_point.display())]
    NotBpffs {
        /// The pin directory.
        path: PathBuf,
        /// Where one could be mounted.
        mount_point: PathBuf,
    },
    /// No bpffs was at its conventional place, and mounting one failed.
    #[error(
        "there is no bpffs at {BPFFS} and mounting one failed; run `mount -t bpf bpf {BPFFS}` on the host"
    )]
    Mount(#[source] io::Error),
    /// Another process holds the directory.
    #[error("another process{} holds {}: there can be one `run` and one `events` for each --pin-dir", pid_phrase(*pid), path.display())]
    Held {
        /// The pin directory.
        path: PathBuf,
        /// The holder, where it can be seen from this pid namespace.
        pid: Option<i32>,
    },
    /// A file operation failed.
    #[error("can't {operation} {}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// With what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

fn pid_phrase(pid: Option<i32>) -> String {
    pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default()
}

pub(super) fn io_error(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PinError {
    let path = path.to_owned();
    move |source| PinError::Io { operation, path, source }
}

/// A TC hook of an interface.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Spot {
    /// Interface index.
    pub ifindex: u32,
    /// Which of its hooks.
    pub edge: Edge,
}

/// A pin directory: paths only.
#[derive(Clone, Debug)]
pub struct PinDir {
    root: PathBuf,
}

impl PinDir {
    /// The pin directory at `root`, which need not exist.
    pub fn new(root: &Path) -> Result<Self, PinError> {
        let root = std::path::absolute(root).map_err(io_error("resolve", root))?;
        Ok(Self { root })
    }

    /// The directory itself.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Pin of a map.
    #[must_use]
    pub fn map(&self, name: &str) -> PathBuf {
        self.maps().join(name)
    }

    /// Pin of a program.
    #[must_use]
    pub fn program(&self, name: &str) -> PathBuf {
        self.programs().join(name)
    }

    /// Pin of the TCX link of an interface.
    #[must_use]
    pub fn link(&self, spot: Spot) -> PathBuf {
        self.links().join(format!("{}{}", link_prefix(spot.edge), spot.ifindex))
    }

    /// Pin of a link of another kind.
    #[must_use]
    pub fn named_link(&self, name: &str) -> PathBuf {
        self.links().join(name)
    }

    /// The pinned links of interfaces, by where each was pinned for.
    pub fn pinned_links(&self) -> Result<Vec<(Spot, PathBuf)>, PinError> {
        let spot_of = |path: &Path| {
            let name = path.file_name()?.to_str()?;
            Edge::ALL.into_iter().find_map(|edge| {
                let ifindex = name.strip_prefix(link_prefix(edge))?.parse().ok()?;
                Some(Spot { ifindex, edge })
            })
        };
        Ok(self.all_links()?.into_iter().filter_map(|path| Some((spot_of(&path)?, path))).collect())
    }

    /// Every pin of a link, of whatever kind.
    pub fn all_links(&self) -> Result<Vec<PathBuf>, PinError> {
        let links = self.links();
        match fs::read_dir(&links).and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            listed => listed.map_err(io_error("list", &links)),
        }
    }

    fn maps(&self) -> PathBuf {
        self.root.join("maps")
    }

    fn programs(&self) -> PathBuf {
        self.root.join("progs")
    }

    fn links(&self) -> PathBuf {
        self.root.join("links")
    }

    /// Whether there is anything at all.
    #[must_use]
    pub fn exists(&self) -> bool {
        self.root.exists()
    }

    /// Makes what is missing of the directory, on a bpffs, and takes it for this process alone.
    pub fn claim(&self) -> Result<Claim, PinError> {
        self.ensure_bpffs()?;
        let is_new = !self.root.exists();
        self.make_directories()?;
        Ok(Claim { dir: self.clone(), lock: self.lock(&self.root)?, ready: None, is_new })
    }

    /// Takes the directory for this process alone, if it exists.
    pub fn claim_existing(&self) -> Result<Option<Claim>, PinError> {
        if !self.exists() {
            return Ok(None);
        }
        Ok(Some(Claim { dir: self.clone(), lock: self.lock(&self.root)?, ready: None, is_new: false }))
    }

    /// Takes the events for this process alone, until dropped, if there are any: by the lock of the programs' directory,
    /// which nothing else needs.
    pub fn claim_events(&self) -> Result<Flock<File>, PinError> {
        self.lock(&self.programs())
    }

    /// The process that holds the directory, if there is one.
    pub fn holder(&self) -> Result<Option<Holder>, PinError> {
        if !is_locked(&self.root)? {
            return Ok(None);
        }
        let inode = fs::metadata(&self.root).map_err(io_error("inspect", &self.root))?.ino();
        Ok(Some(Holder { pid: holder_of(inode), is_ready: is_locked(&self.maps())? }))
    }

    fn make_directories(&self) -> Result<(), PinError> {
        for directory in [&self.root, &self.maps(), &self.programs(), &self.links()] {
            DirBuilder::new()
                .mode(MODE)
                .recursive(true)
                .create(directory)
                .map_err(io_error("create", directory))?;
        }
        fs::set_permissions(&self.root, Permissions::from_mode(MODE)).map_err(io_error("protect", &self.root))
    }

    /// Takes the lock of the directory that is at `path` then: one that was removed meanwhile is no use.
    fn lock(&self, path: &Path) -> Result<Flock<File>, PinError> {
        let deadline = Instant::now() + LOCK_PATIENCE;
        loop {
            let directory = File::open(path).map_err(io_error("open", path))?;
            let inode = directory.metadata().map_err(io_error("inspect", path))?.ino();
            match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
                Ok(lock) if is_at(path, inode) => return Ok(lock),
                Ok(_) => self.make_directories()?,
                Err(_) if Instant::now() < deadline => thread::sleep(LOCK_RETRY),
                Err(_) => return Err(PinError::Held { path: path.to_owned(), pid: holder_of(inode) }),
            }
        }
    }

    fn ensure_bpffs(&self) -> Result<(), PinError> {
        if self.is_on_bpffs()? {
            return Ok(());
        }
        if !self.root.starts_with(BPFFS) {
            let mount_point = self.root.parent().unwrap_or(&self.root).to_owned();
            return Err(PinError::NotBpffs { path: self.root.clone(), mount_point });
        }
        mount(
            Some("bpf"),
            BPFFS,
            Some("bpf"),
            MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
            None::<&str>,
        )
        .map_err(|errno| PinError::Mount(errno.into()))?;
        log::info!("mounted a bpffs at {BPFFS}");
        Ok(())
    }

    fn is_on_bpffs(&self) -> Result<bool, PinError> {
        let existing = self.root.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
        let stat = statfs(existing).map_err(|errno| io_error("inspect", existing)(errno.into()))?;
        Ok(stat.filesystem_type() == BPFFS_MAGIC)
    }
}

/// Another process that holds the pin directory.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Holder {
    /// Its pid, where that can be seen from this pid namespace.
    pub pid: Option<i32>,
    /// Whether it is through with its first look at every interface.
    pub is_ready: bool,
}

/// The pin directory, held by this process until dropped.
#[derive(Debug)]
pub struct Claim {
    dir: PinDir,
    lock: Flock<File>,
    /// Lock of the maps' directory, which says that the holder is ready: like the other one it can't outlive it.
    ready: Option<Flock<File>>,
    is_new: bool,
}

impl Claim {
    /// The paths in it.
    #[must_use]
    pub fn dir(&self) -> &PinDir {
        &self.dir
    }

    /// Whether the directory was made for this claim.
    #[must_use]
    pub fn is_new(&self) -> bool {
        self.is_new
    }

    /// Lets `status` know that every interface was looked at.
    pub fn announce_ready(&mut self) -> Result<(), PinError> {
        if self.ready.is_none() {
            self.ready = Some(self.dir.lock(&self.dir.maps())?);
        }
        Ok(())
    }

    /// Makes again, and holds again, what somebody removed. Returns whether anything was missing.
    pub fn restore(&mut self) -> Result<bool, PinError> {
        let whole = holds(&self.lock, &self.dir.root)
            && self.ready.as_ref().is_none_or(|ready| holds(ready, &self.dir.maps()))
            && [self.dir.maps(), self.dir.programs(), self.dir.links()].iter().all(|path| path.is_dir());
        if whole {
            return Ok(false);
        }
        self.dir.ensure_bpffs()?;
        self.dir.make_directories()?;
        if !holds(&self.lock, &self.dir.root) {
            self.lock = self.dir.lock(&self.dir.root)?;
        }
        if self.ready.take().is_some() {
            self.announce_ready()?;
        }
        Ok(true)
    }

    /// Removes the directory with all pins in it.
    pub fn remove(self) -> Result<(), PinError> {
        fs::remove_dir_all(self.dir.root()).map_err(io_error("remove", self.dir.root()))
    }
}

/// Pins an object at `path`, in place of whatever is there, with no moment without a pin.
pub fn pin_over(object: impl AsFd, path: &Path) -> Result<(), PinError> {
    // A bpffs takes no dots in names.
    let mut new = path.as_os_str().to_owned();
    new.push("_new");
    let new = PathBuf::from(new);
    unpin(&new)?;
    bpf::pin(object, &new).map_err(io_error("pin", &new))?;
    fs::rename(&new, path).map_err(io_error("replace", path))
}

/// Opens what is pinned at `path`, or `None` where nothing is.
pub fn open(path: &Path) -> Result<Option<OwnedFd>, PinError> {
    match bpf::get(path) {
        Ok(object) => Ok(Some(object)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io_error("open", path)(error)),
    }
}

/// Removes a pin, if it is there.
pub fn unpin(path: &Path) -> Result<(), PinError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("unpin", path)(error)),
        _ => Ok(()),
    }
}

/// Whether a lock is that of the directory that is at `path` now.
fn holds(lock: &Flock<File>, path: &Path) -> bool {
    lock.metadata().is_ok_and(|metadata| is_at(path, metadata.ino()))
}

fn is_at(path: &Path, inode: u64) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.ino() == inode)
}

/// Whether a process holds the lock of the directory at `path`, if there is one.
fn is_locked(path: &Path) -> Result<bool, PinError> {
    let directory = match File::open(path) {
        Ok(directory) => directory,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(io_error("open", path)(error)),
    };
    Ok(Flock::lock(directory, FlockArg::LockSharedNonblock).is_err())
}

/// The process that holds a flock(2) on an inode, from /proc/locks: `1: FLOCK ADVISORY WRITE PID MAJ:MIN:INODE 0 EOF`.
fn holder_of(inode: u64) -> Option<i32> {
    let locks = fs::read_to_string("/proc/locks").ok()?;
    locks.lines().find_map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let [_, "FLOCK", _, "WRITE", pid, file, ..] = fields[..] else { return None };
        let same = file.rsplit(':').next()?.parse() == Ok(inode);
        pid.parse().ok().filter(|&pid| same && pid > 0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_pins() {
        let dir = PinDir::new(Path::new("/sys/fs/bpf/imds")).unwrap();
        let spot = |edge| Spot { ifindex: 12, edge };
        assert_eq!(dir.link(spot(Edge::Pod)), Path::new("/sys/fs/bpf/imds/links/pod_edge_12"));
        assert_eq!(dir.link(spot(Edge::Node)), Path::new("/sys/fs/bpf/imds/links/node_edge_12"));
        assert_eq!(dir.map("m"), Path::new("/sys/fs/bpf/imds/maps/m"));
        assert_eq!(dir.program("p"), Path::new("/sys/fs/bpf/imds/progs/p"));
    }

    #[test]
    fn a_directory_on_another_file_system_is_refused_with_the_remedy() {
        let elsewhere = tempfile::tempdir().unwrap();
        let dir = PinDir::new(&elsewhere.path().join("pins")).unwrap();
        let error = dir.claim().unwrap_err();
        assert!(matches!(error, PinError::NotBpffs { .. }), "{error}");
        assert!(error.to_string().contains("mount -t bpf bpf"), "{error}");
        assert!(!dir.exists());
    }
}
