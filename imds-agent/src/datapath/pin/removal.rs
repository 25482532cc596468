//! Removal of a pin directory. Removes only names that agents create, one entry at a time, and does not follow symlinks.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::{
    contents::{PinKind, entries, is_directory},
    dir::{PinDir, PinError, ignore_missing, io_error},
    unload_request::REQUEST,
};
use crate::datapath::sys::rcu::RECORD;

impl PinDir {
    /// Removes the entries that agents create, and the directory if it is then empty. Returns the paths of the remaining entries,
    /// which belong to other programs.
    pub(crate) fn remove_own(&self) -> Result<Vec<PathBuf>, PinError> {
        let mut left = Vec::new();
        for kind in PinKind::ALL {
            let directory = self.directory(kind);
            if !is_directory(&directory) {
                continue;
            }
            for path in entries(&directory)? {
                if !kind.is_pin(&path) || !remove_entry(&path)? {
                    left.push(path);
                }
            }
            remove_empty(&directory)?;
        }
        remove_empty(&self.root().join(REQUEST))?;
        remove_empty(&self.root().join(RECORD))?;
        let subdirectories = PinKind::ALL.map(|kind| self.directory(kind));
        left.extend(entries(self.root())?.into_iter().filter(|path| !subdirectories.contains(path)));
        remove_empty(self.root())?;
        Ok(left)
    }
}

/// Removes a pin, a symlink, or an empty directory with the name of a pin. Returns `false` for a directory with entries, which
/// agents do not create.
fn remove_entry(path: &Path) -> Result<bool, PinError> {
    if is_directory(path) {
        return remove_empty(path);
    }
    ignore_missing(fs::remove_file(path)).map_err(io_error("unpin", path))?;
    Ok(true)
}

/// Removes a directory if it is empty. Returns `true` if it does not exist afterwards.
fn remove_empty(path: &Path) -> Result<bool, PinError> {
    match ignore_missing(fs::remove_dir(path)) {
        Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(false),
        removed => removed.map(|()| true).map_err(io_error("remove", path)),
    }
}
