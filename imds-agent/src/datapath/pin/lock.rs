//! Lock of a pin directory: flock(2) on the directory, held by the agent that uses it. An agent without a bpffs locks its
//! network namespace instead.

use std::{
    fs::{self, File, Metadata},
    io,
    os::unix::fs::MetadataExt as _,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use nix::{
    fcntl::{Flock, FlockArg},
    sys::stat::{major, minor},
};

use super::{
    contents::PinKind,
    dir::{PinDir, PinError, io_error, open_existing},
};
use crate::datapath::sys::rcu;

/// Time limit for taking the lock. `status` holds it for a moment to check whether another process does.
const LOCK_TIMEOUT: Duration = Duration::from_secs(1);
const LOCK_RETRY: Duration = Duration::from_millis(20);
/// File that an agent locks if no bpffs is mounted.
const NETNS: &str = "/proc/thread-self/ns/net";

/// Problem of an agent that runs on a node without a bpffs.
pub const UNPINNED: &str = "the agent runs without a bpffs: enforcement ends with the agent, and its maps can't be read from outside";
/// Remedy for [`UNPINNED`].
pub const UNPINNED_REMEDY: &str = "run `mount -t bpf bpf /sys/fs/bpf` on the node; the agent pins everything at its next resync, in a \
                                   container after a restart";

impl PinDir {
    /// Creates the directory and its subdirectories if missing, and locks it for this process. Fails if it is not on a bpffs.
    pub fn lock(&self) -> Result<PinLock, PinError> {
        self.ensure_bpffs()?;
        self.ensure_usable()?;
        let is_new = !self.exists();
        let lock = self.locked_by(self.lock_path(self.root())?, is_new);
        // Only under the lock: `unload` may have been removing them.
        self.make_directories()?;
        // A killed `unload` may have left the setting changed, and its request in place.
        rcu::restore_if_recorded(self);
        self.withdraw_unload_request()?;
        Ok(lock)
    }

    /// Locks the directory like [`Self::lock`], or the network namespace if no bpffs is mounted at the conventional mount
    /// point and mounting one failed. [`PinLock::restore`] creates the directory once a bpffs is mounted.
    pub fn lock_or_run_unpinned(&self) -> Result<PinLock, PinError> {
        match self.lock() {
            Err(error @ PinError::Mount(_)) => {
                let mut lock = self.locked_by(self.lock_path(NETNS.as_ref())?, false);
                lock.record_failure(error);
                Ok(lock)
            }
            locked => locked,
        }
    }

    /// Locks the directory for this process, if it exists and no other process holds the lock.
    pub(crate) fn try_lock_existing(&self) -> Result<Option<PinLock>, PinError> {
        let Some(directory) = open_existing(self.root())? else { return Ok(None) };
        let inode = directory.metadata().map_err(io_error("inspect", self.root()))?.ino();
        let lock = Flock::lock(directory, FlockArg::LockExclusiveNonblock).ok();
        let lock = lock.filter(|_| has_inode(self.root(), inode));
        Ok(lock.map(|lock| self.locked_by(lock, false)))
    }

    /// Locks the directory for this process, if it exists and its agent has stopped. Waits for `status`, which holds the lock for
    /// a moment.
    pub(crate) fn lock_stopped(&self) -> Result<Option<PinLock>, PinError> {
        let deadline = Instant::now() + LOCK_TIMEOUT;
        loop {
            let lock = self.try_lock_existing()?;
            if lock.is_some() || !self.exists() || Instant::now() >= deadline {
                return Ok(lock);
            }
            thread::sleep(LOCK_RETRY);
        }
    }

    fn locked_by(&self, lock: Flock<File>, is_new: bool) -> PinLock {
        PinLock { dir: self.clone(), lock, ready: None, is_new, failure: None }
    }

    /// Locks the event ring buffer for this process until the result is dropped. Returns `None` if another process holds the
    /// lock. Uses the directory of programs for the lock, which has no other lock.
    pub fn try_lock_events(&self) -> Result<Option<Flock<File>>, PinError> {
        let path = self.directory(PinKind::Program);
        let directory = File::open(&path).map_err(io_error("open", &path))?;
        Ok(Flock::lock(directory, FlockArg::LockExclusiveNonblock).ok())
    }

    /// Returns the process that holds the lock of the directory, or `None` if no process does.
    pub fn lock_owner(&self) -> Result<Option<LockOwner>, PinError> {
        let Some(owner) = lock_owner(self.root())? else { return Ok(None) };
        Ok(Some(LockOwner { is_ready: is_locked(&self.directory(PinKind::Map))?, ..owner }))
    }

    /// Locks the directory at `path`. If the directory does not exist or was removed in the meantime, creates it and locks the new
    /// one.
    fn lock_path(&self, path: &Path) -> Result<Flock<File>, PinError> {
        let deadline = Instant::now() + LOCK_TIMEOUT;
        loop {
            let directory = match File::open(path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound && path.starts_with(self.root()) => {
                    self.make_directories()?;
                    continue;
                }
                opened => opened.map_err(io_error("open", path))?,
            };
            let metadata = directory.metadata().map_err(io_error("inspect", path))?;
            match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
                Ok(lock) if has_inode(path, metadata.ino()) => return Ok(lock),
                Ok(_) => self.make_directories()?,
                Err(_) if Instant::now() < deadline => thread::sleep(LOCK_RETRY),
                Err(_) => {
                    let pid = find_lock_owner(&metadata);
                    return Err(PinError::Locked { path: path.to_owned(), pid });
                }
            }
        }
    }
}

/// Returns the agent that runs without a bpffs in this network namespace. Such an agent never is ready.
pub fn unpinned_agent() -> Result<Option<LockOwner>, PinError> {
    lock_owner(NETNS.as_ref())
}

/// Returns the process that holds the lock of the file at `path`, if any does.
fn lock_owner(path: &Path) -> Result<Option<LockOwner>, PinError> {
    if !is_locked(path)? {
        return Ok(None);
    }
    let metadata = fs::metadata(path).map_err(io_error("inspect", path))?;
    Ok(Some(LockOwner { pid: find_lock_owner(&metadata), is_ready: false }))
}

/// Another process that holds the lock of a pin directory.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct LockOwner {
    /// Pid of the process; `None` if it is not visible in this pid namespace.
    pub pid: Option<i32>,
    /// True after the agent has reconciled every interface once.
    pub is_ready: bool,
}

/// Lock of a pin directory, released when dropped.
#[derive(Debug)]
pub struct PinLock {
    /// The locked pin directory.
    pub(in crate::datapath) dir: PinDir,
    lock: Flock<File>,
    /// Lock of the directory of maps, which marks the agent as ready. The kernel releases it when the process ends.
    ready: Option<Flock<File>>,
    /// True if this process has created the directory.
    pub(in crate::datapath) is_new: bool,
    /// Reason why nothing is pinned; `None` if a bpffs is mounted.
    pub(in crate::datapath) failure: Option<String>,
}

impl PinLock {
    /// Records that no bpffs is mounted. Logs each failure once.
    fn record_failure(&mut self, error: PinError) {
        let failure = format!("{:#}", anyhow::Error::from(error));
        if self.failure.as_ref() != Some(&failure) {
            log::error!("{failure}; enforcing without pins: enforcement ends with the agent");
            self.failure = Some(failure);
        }
    }

    /// Marks the agent as ready: `status` then reports that every interface was reconciled. Does nothing without a bpffs.
    pub fn set_ready(&mut self) -> Result<(), PinError> {
        if self.ready.is_none() && self.failure.is_none() {
            self.ready = Some(self.dir.lock_path(&self.dir.directory(PinKind::Map))?);
        }
        Ok(())
    }

    /// Creates removed directories again, and locks them. Returns `true` if any was missing. Without a bpffs, records that as
    /// the failure.
    pub fn restore(&mut self) -> Result<bool, PinError> {
        let is_complete = is_lock_of(&self.lock, self.dir.root())
            && self.ready.as_ref().is_none_or(|ready| is_lock_of(ready, &self.dir.directory(PinKind::Map)))
            && PinKind::ALL.into_iter().all(|kind| self.dir.directory(kind).is_dir());
        if is_complete {
            return Ok(false);
        }
        match self.dir.ensure_bpffs() {
            Err(error) if error.is_missing_bpffs() => {
                self.record_failure(error);
                return Ok(false);
            }
            ensured => ensured?,
        }
        self.failure = None;
        self.dir.make_directories()?;
        if !is_lock_of(&self.lock, self.dir.root()) {
            self.lock = self.dir.lock_path(self.dir.root())?;
        }
        if self.ready.take().is_some() {
            self.set_ready()?;
        }
        Ok(true)
    }

    /// Removes the agent's pins, and the directory if no other entries are left.
    pub fn remove(self) -> Result<(), PinError> {
        self.dir.remove_own().map(drop)
    }
}

/// Reports whether the lock belongs to the directory that is now at `path`.
fn is_lock_of(lock: &Flock<File>, path: &Path) -> bool {
    lock.metadata().is_ok_and(|metadata| has_inode(path, metadata.ino()))
}

fn has_inode(path: &Path, inode: u64) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.ino() == inode)
}

/// Reports whether a process holds the lock of the directory at `path`. Returns `false` if the directory does not exist.
fn is_locked(path: &Path) -> Result<bool, PinError> {
    let Some(directory) = open_existing(path)? else { return Ok(false) };
    Ok(Flock::lock(directory, FlockArg::LockSharedNonblock).is_err())
}

/// Returns the pid of the process that holds a flock(2) on a file, from /proc/locks.
fn find_lock_owner(file: &Metadata) -> Option<i32> {
    owner_in(&fs::read_to_string("/proc/locks").ok()?, file.dev(), file.ino())
}

/// Returns the pid in the line of this inode. The format of a line is `1: FLOCK ADVISORY WRITE PID MAJ:MIN:INODE 0 EOF`, with
/// hexadecimal device numbers. Other file systems have the same inode numbers.
fn owner_in(locks: &str, device: u64, inode: u64) -> Option<i32> {
    let file = format!("{:02x}:{:02x}:{inode}", major(device), minor(device));
    locks.lines().find_map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let [_, "FLOCK", _, "WRITE", pid, locked, ..] = fields[..] else { return None };
        pid.parse().ok().filter(|&pid| locked == file && pid > 0)
    })
}

#[cfg(test)]
mod tests {
    use nix::sys::stat::makedev;

    use super::*;

    #[test]
    fn missing_directory_is_made_and_locked() {
        let directory = tempfile::tempdir().unwrap();
        let pins = PinDir::new(&directory.path().join("pins")).unwrap();
        let lock = pins.lock_path(pins.root()).unwrap();
        assert!(is_lock_of(&lock, pins.root()) && pins.directory(PinKind::Map).is_dir());
    }

    #[test]
    fn owner_is_that_of_the_same_file_system() {
        let locks = "1: FLOCK  ADVISORY  WRITE 7 00:1a:42 0 EOF\n\
                     2: FLOCK  ADVISORY  WRITE 8 00:2b:42 0 EOF\n\
                     3: POSIX  ADVISORY  WRITE 9 103:02:43 0 EOF\n";
        assert_eq!(owner_in(locks, makedev(0, 0x2b), 42), Some(8));
        assert_eq!(owner_in(locks, makedev(0, 0x2c), 42), None);
        assert_eq!(owner_in(locks, makedev(0x103, 2), 43), None);
    }
}
