//! Request of `imds-agent unload` to the running agent: a directory in the pin directory.
//!
//! Only a process that may change the pins can create it, and such a process can end enforcement anyway. inotify notifies the
//! agent at once, even if both processes run in different mount namespaces.

use std::{fs, io, path::PathBuf};

use super::{
    contents::is_directory,
    dir::{PinDir, PinError, ignore_missing, io_error},
};
use crate::node::file_watch::FileWatcher;

/// Name of the request's directory in the pin directory.
pub(crate) const REQUEST: &str = "unload";

impl PinDir {
    fn unload_request(&self) -> PathBuf {
        self.root().join(REQUEST)
    }

    /// Asks the agent to release the directory. Returns `false` if the pin directory was removed.
    pub(crate) fn request_unload(&self) -> Result<bool, PinError> {
        let request = self.unload_request();
        match fs::create_dir(&request) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(io_error("create", &request)(error)),
        }
    }

    /// Withdraws the request, so that it does not reach an agent that starts later.
    pub(crate) fn withdraw_unload_request(&self) -> Result<(), PinError> {
        let request = self.unload_request();
        ignore_missing(fs::remove_dir(&request)).map_err(io_error("remove", &request))
    }

    /// Reports whether `unload` has asked the agent to release the directory.
    pub(crate) fn is_unload_requested(&self) -> bool {
        is_directory(&self.unload_request())
    }

    /// Watches for the request. Must be called within a tokio runtime.
    pub(crate) fn watch_unload_request(&self) -> io::Result<FileWatcher> {
        FileWatcher::new(&self.unload_request())
    }
}
