//! Who holds a pin directory.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt as _,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use nix::fcntl::{Flock, FlockArg};

use super::pins::{PinDir, PinError, io_error};

/// How long to wait for the lock: `status` holds it for a moment to see whether somebody else does.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);
const LOCK_RETRY: Duration = Duration::from_millis(20);

impl PinDir {
    /// Makes what is missing of the directory, on a bpffs, and takes it for this process alone.
    pub fn claim(&self) -> Result<Claim, PinError> {
        self.ensure_bpffs()?;
        self.ensure_usable()?;
        let is_new = !self.exists();
        self.make_directories()?;
        let claim = Claim { dir: self.clone(), lock: self.lock(self.root())?, ready: None, is_new };
        // Left by an `unload` that was killed.
        self.withdraw_unload_request()?;
        Ok(claim)
    }

    /// Takes the directory for this process alone, if it exists and no other process holds it.
    pub(super) fn try_claim_existing(&self) -> Result<Option<Claim>, PinError> {
        let directory = match File::open(self.root()) {
            Ok(directory) => directory,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io_error("open", self.root())(error)),
        };
        let inode = directory.metadata().map_err(io_error("inspect", self.root()))?.ino();
        let lock = Flock::lock(directory, FlockArg::LockExclusiveNonblock).ok();
        let lock = lock.filter(|_| is_at(self.root(), inode));
        Ok(lock.map(|lock| Claim { dir: self.clone(), lock, ready: None, is_new: false }))
    }

    /// Takes the events for this process alone, until dropped, by the lock of the programs' directory, which nothing else
    /// needs; `None` where another process has them.
    pub fn try_claim_events(&self) -> Result<Option<Flock<File>>, PinError> {
        let path = self.programs();
        let directory = File::open(&path).map_err(io_error("open", &path))?;
        Ok(Flock::lock(directory, FlockArg::LockExclusiveNonblock).ok())
    }

    /// The process that holds the directory, if there is one.
    pub fn holder(&self) -> Result<Option<Holder>, PinError> {
        if !is_locked(self.root())? {
            return Ok(None);
        }
        let inode = fs::metadata(self.root()).map_err(io_error("inspect", self.root()))?.ino();
        Ok(Some(Holder { pid: holder_of(inode), is_ready: is_locked(&self.maps())? }))
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
        let whole = holds(&self.lock, self.dir.root())
            && self.ready.as_ref().is_none_or(|ready| holds(ready, &self.dir.maps()))
            && [self.dir.maps(), self.dir.programs(), self.dir.links()].iter().all(|path| path.is_dir());
        if whole {
            return Ok(false);
        }
        self.dir.ensure_bpffs()?;
        self.dir.make_directories()?;
        if !holds(&self.lock, self.dir.root()) {
            self.lock = self.dir.lock(self.dir.root())?;
        }
        if self.ready.take().is_some() {
            self.announce_ready()?;
        }
        Ok(true)
    }

    /// Removes the directory with the agent's pins in it.
    pub fn remove(self) -> Result<(), PinError> {
        self.dir.remove_own().map(drop)
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
