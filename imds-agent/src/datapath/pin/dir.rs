//! The pin directory: paths of the pins, creation of the directory, and operations on single pins.

use std::{
    fs::{self, DirBuilder, File, Permissions},
    io, iter,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use imds_ebpf_common::{TcHook, names::link_prefix};
use nix::{
    mount::{MsFlags, mount},
    sys::statfs::{FsType, statfs},
    unistd::{AccessFlags, access, mkdtemp},
};
use thiserror::Error;

use crate::datapath::{
    pin::{
        contents::{PinKind, entries},
        mount_namespace::{PRIVATE_BPFFS, PRIVATE_BPFFS_REMEDY},
    },
    sys::bpf,
};

/// Conventional mount point of a bpffs, and the only one where the agent mounts a bpffs itself.
pub(crate) const BPFFS: &str = "/sys/fs/bpf";
pub(crate) const BPFFS_MAGIC: FsType = FsType(libc::BPF_FS_MAGIC);
/// Suffix of a new pin before it replaces another one. Names on a bpffs must not contain dots.
pub(crate) const REPLACEMENT_SUFFIX: &str = "_new";
/// Mode of the directories: owner only, because a process that can open a pin can detach a link or write a map.
const MODE: u32 = 0o700;
/// Options of a bpffs that the agent mounts: the mode of its root, as systemd sets it.
const MOUNT_OPTIONS: &str = "mode=0700";

/// Error of a pin directory.
#[derive(Debug, Error)]
pub enum PinError {
    /// The path is not on a bpffs.
    #[error("{} is not on a bpffs; mount one with `mount -t bpf bpf {}` or choose another --pin-dir", path.display(), mount_point.display())]
    NotBpffs {
        /// Path of the pin directory.
        path: PathBuf,
        /// Directory where a bpffs can be mounted.
        mount_point: PathBuf,
    },
    /// The path is not a directory that an agent may use or remove.
    #[error("refusing to use {}: {reason}; name the directory of `imds-agent run --pin-dir` (default: {BPFFS}/imds)", path.display())]
    NotPinDir {
        /// Path of the directory.
        path: PathBuf,
        /// Reason for the refusal.
        reason: &'static str,
    },
    /// The running agent did not release the directory for `unload` in time.
    #[error("the running agent{} did not release {} within {timeout:?}", pid_phrase(*pid), path.display())]
    NotReleased {
        /// Path of the pin directory.
        path: PathBuf,
        /// Pid of the agent; `None` if it is not visible in this pid namespace.
        pid: Option<i32>,
        /// Time limit of `unload`.
        timeout: Duration,
    },
    /// No bpffs is mounted at the conventional mount point, and mounting one failed.
    #[error(
        "failed to mount a bpffs at {BPFFS}; run `mount -t bpf bpf {BPFFS}` on the node, or grant CAP_SYS_ADMIN"
    )]
    Mount(#[source] io::Error),
    /// Another process holds the lock of the directory.
    #[error("another process{} holds the lock of {}: each --pin-dir allows one `run` and one `events`", pid_phrase(*pid), path.display())]
    Locked {
        /// Path of the locked directory.
        path: PathBuf,
        /// Pid of the other process; `None` if it is not visible in this pid namespace.
        pid: Option<i32>,
    },
    /// A file operation failed.
    #[error("failed to {operation} {}", path.display())]
    Io {
        /// Operation, for the message: a verb and possibly an object.
        operation: &'static str,
        /// Path of the file or directory.
        path: PathBuf,
        /// Error of the system.
        source: io::Error,
    },
}

impl PinError {
    /// Reports whether no bpffs is mounted, so that nothing can be pinned.
    pub(super) fn is_missing_bpffs(&self) -> bool {
        matches!(self, Self::NotBpffs { .. } | Self::Mount(_))
    }
}

/// Returns the pid of a process for a message, or nothing if it is unknown.
pub(crate) fn pid_phrase(pid: Option<i32>) -> String {
    pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default()
}

pub(crate) fn io_error(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PinError {
    let path = path.to_owned();
    move |source| PinError::Io { operation, path, source }
}

/// Attach point of a program: a TC hook of one interface.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct AttachPoint {
    /// Index of the interface.
    pub ifindex: u32,
    /// TC hook of the interface.
    pub hook: TcHook,
}

/// Path of a pin directory, and paths of the pins in it.
#[derive(Clone, Debug)]
pub struct PinDir {
    root: PathBuf,
}

impl PinDir {
    /// Returns the pin directory at `root`, which does not have to exist.
    pub fn new(root: &Path) -> Result<Self, PinError> {
        let root = std::path::absolute(root).map_err(io_error("resolve", root))?;
        Ok(Self { root })
    }

    /// Returns the absolute path of the directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Returns the path of the pin of a map.
    pub fn map(&self, name: &str) -> PathBuf {
        self.directory(PinKind::Map).join(name)
    }

    /// Returns the path of the pin of a program.
    pub fn program(&self, name: &str) -> PathBuf {
        self.directory(PinKind::Program).join(name)
    }

    /// Returns the path of the pin of the TCX or netkit link at an attach point.
    pub fn link(&self, point: AttachPoint) -> PathBuf {
        self.named_link(&format!("{}{}", link_prefix(point.hook), point.ifindex))
    }

    /// Returns the path of the pin of a cgroup link.
    pub fn named_link(&self, name: &str) -> PathBuf {
        self.directory(PinKind::Link).join(name)
    }

    /// Returns the paths of the pinned links of interfaces, each with its attach point.
    pub fn pinned_links(&self) -> Result<Vec<(AttachPoint, PathBuf)>, PinError> {
        let point_of = |path: &Path| {
            let name = path.file_name()?.to_str()?;
            TcHook::ALL.into_iter().find_map(|hook| {
                let ifindex = name.strip_prefix(link_prefix(hook))?.parse().ok()?;
                Some(AttachPoint { ifindex, hook })
            })
        };
        Ok(self.all_links()?.into_iter().filter_map(|path| Some((point_of(&path)?, path))).collect())
    }

    /// Returns the paths of all pinned links, of interfaces and cgroups.
    pub fn all_links(&self) -> Result<Vec<PathBuf>, PinError> {
        entries(&self.directory(PinKind::Link))
    }

    /// Returns the path of the subdirectory with the pins of this kind.
    pub(crate) fn directory(&self, kind: PinKind) -> PathBuf {
        self.root.join(kind.directory())
    }

    /// Reports whether the path exists.
    pub fn exists(&self) -> bool {
        self.root.exists()
    }

    pub(crate) fn make_directories(&self) -> Result<(), PinError> {
        let inner = PinKind::ALL.map(|kind| self.directory(kind));
        for taken in inner.iter().filter(|path| !path.is_dir()) {
            unpin(taken)?;
        }
        for directory in iter::once(&self.root).chain(&inner) {
            DirBuilder::new()
                .mode(MODE)
                .recursive(true)
                .create(directory)
                .map_err(io_error("create", directory))?;
        }
        fs::set_permissions(&self.root, Permissions::from_mode(MODE)).map_err(io_error("protect", &self.root))
    }

    /// Creates and removes a directory beside this one, or in its nearest ancestor that exists. A mount point of a bpffs has
    /// nothing beside it there: checks only the access to it.
    pub(crate) fn probe_creation(&self) -> io::Result<()> {
        let mut ancestors = self.root.ancestors().skip(1);
        let parent = ancestors.find(|path| path.exists()).unwrap_or(Path::new("/"));
        if lacks_bpffs(parent) {
            return Ok(access(&self.root, AccessFlags::W_OK | AccessFlags::X_OK)?);
        }
        fs::remove_dir(mkdtemp(&parent.join("imds-doctor-XXXXXX"))?)
    }

    pub(crate) fn ensure_bpffs(&self) -> Result<(), PinError> {
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
            Some(MOUNT_OPTIONS),
        )
        .map_err(|errno| PinError::Mount(errno.into()))?;
        log::info!("mounted a bpffs at {BPFFS}");
        if self.parent().is_private() {
            log::warn!("{PRIVATE_BPFFS}; {PRIVATE_BPFFS_REMEDY}");
        }
        Ok(())
    }

    /// Returns the parent directory, which exists before the pin directory does.
    fn parent(&self) -> Self {
        Self { root: self.root.parent().unwrap_or(&self.root).to_owned() }
    }

    /// Reports whether the directory is on a bpffs. If it does not exist, checks its nearest existing ancestor.
    pub fn is_on_bpffs(&self) -> Result<bool, PinError> {
        is_on_bpffs(&self.root)
    }
}

fn is_on_bpffs(path: &Path) -> Result<bool, PinError> {
    let existing = path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let stat = statfs(existing).map_err(|errno| io_error("inspect", existing)(errno.into()))?;
    Ok(stat.filesystem_type() == BPFFS_MAGIC)
}

/// Reports whether no object can be pinned at `path`, because no bpffs is mounted there.
pub(crate) fn lacks_bpffs(path: &Path) -> bool {
    is_on_bpffs(path).is_ok_and(|is_on_bpffs| !is_on_bpffs)
}

/// Pins an object at `path`. Replaces an existing pin atomically. Does nothing while no bpffs is mounted, which
/// [`Datapath::pin_failure`](crate::datapath::Datapath::pin_failure) reports.
pub fn replace_pin(object: impl AsFd, path: &Path) -> Result<(), PinError> {
    let mut new = path.as_os_str().to_owned();
    new.push(REPLACEMENT_SUFFIX);
    let new = PathBuf::from(new);
    unpin(&new)?;
    match bpf::pin(object, &new) {
        Err(_) if lacks_bpffs(&new) => return Ok(()),
        pinned => pinned.map_err(io_error("pin", &new))?,
    }
    if path.is_dir() {
        // rename(2) cannot replace a directory by a pin.
        unpin(path)?;
    }
    fs::rename(&new, path).map_err(io_error("replace", path))
}

/// Opens the object that is pinned at `path`. Returns `None` if the path does not exist or is a directory.
pub fn open(path: &Path) -> Result<Option<OwnedFd>, PinError> {
    match bpf::get(path) {
        Ok(object) => Ok(Some(object)),
        Err(error) if error.kind() == io::ErrorKind::NotFound || path.is_dir() => Ok(None),
        Err(error) => Err(io_error("open", path)(error)),
    }
}

/// Returns the link that is pinned at `path`, or `None` if there is no link that can be opened.
pub fn link_at(path: &Path) -> Option<bpf::Link> {
    bpf::link(open(path).ok()??).ok()?
}

/// Opens the link that is pinned at `path`, unless its program is known to belong to other software. Does not follow symlinks,
/// whose target is a pin outside this directory.
pub(crate) fn open_own_link(path: &Path) -> Option<(OwnedFd, bpf::Link)> {
    if fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_symlink()) {
        return None;
    }
    let fd = open(path).ok()??;
    let link = bpf::link(&fd).ok()??;
    (!bpf::is_foreign(link.program)).then_some((fd, link))
}

/// Removes a pin if it exists, or a directory that another program created at its path.
pub fn unpin(path: &Path) -> Result<(), PinError> {
    let removed = match fs::remove_file(path) {
        Err(_) if path.is_dir() => fs::remove_dir_all(path),
        removed => removed,
    };
    ignore_missing(removed).map_err(io_error("unpin", path))
}

/// Returns the result of a removal. A file or directory that is missing counts as removed.
pub(crate) fn ignore_missing(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// Opens a file or directory. Returns `None` if the path does not exist.
pub(crate) fn open_existing(path: &Path) -> Result<Option<File>, PinError> {
    match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        opened => opened.map(Some).map_err(io_error("open", path)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pin_names() {
        let dir = PinDir::new(Path::new("/sys/fs/bpf/imds")).unwrap();
        let point = |hook| AttachPoint { ifindex: 12, hook };
        assert_eq!(dir.link(point(TcHook::FromPod)), Path::new("/sys/fs/bpf/imds/links/from_pod_12"));
        assert_eq!(dir.link(point(TcHook::NodeEgress)), Path::new("/sys/fs/bpf/imds/links/node_egress_12"));
        assert_eq!(dir.map("m"), Path::new("/sys/fs/bpf/imds/maps/m"));
        assert_eq!(dir.program("p"), Path::new("/sys/fs/bpf/imds/progs/p"));
    }

    #[test]
    fn non_bpffs_dir_is_rejected_with_remedy() {
        let elsewhere = tempfile::tempdir().unwrap();
        let dir = PinDir::new(&elsewhere.path().join("pins")).unwrap();
        let error = dir.lock().unwrap_err();
        assert!(matches!(error, PinError::NotBpffs { .. }), "{error}");
        assert!(error.to_string().contains("mount -t bpf bpf"), "{error}");
        assert!(!dir.exists());
    }
}
