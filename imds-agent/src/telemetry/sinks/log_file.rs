//! Sink that writes JSON lines to a file, which it rotates by size.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, ErrorKind, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::unistd::geteuid;

use super::{
    sink_error::{Sent, SinkError, io_failed},
    sink_record::SinkRecord,
};
use crate::config::LogFile;

const FILE_MODE: u32 = 0o640;
const DIRECTORY_MODE: u32 = 0o750;

#[derive(Debug)]
pub(super) struct LogFileSink {
    config: LogFile,
    open: Option<OpenFile>,
}

/// The open file, with its device and inode, and its size.
#[derive(Debug)]
struct OpenFile {
    file: File,
    id: (u64, u64),
    size: u64,
}

impl LogFileSink {
    pub(super) fn new(config: LogFile) -> Self {
        Self { config, open: None }
    }

    pub(super) fn send(&mut self, batch: &[Arc<SinkRecord>]) -> Sent {
        self.check_open_file();
        for (index, record) in batch.iter().enumerate() {
            if let Err(error) = self.write(&record.line()) {
                return Sent::until(index, error);
            }
        }
        Sent::all(batch.len())
    }

    /// Closes the file if logrotate or an operator has moved or removed it.
    fn check_open_file(&mut self) {
        let found = fs::symlink_metadata(&self.config.path).ok();
        self.open = self.open.take().zip(found).and_then(|(open, found)| {
            let is_same = (found.dev(), found.ino()) == open.id;
            is_same.then_some(OpenFile { size: found.len(), ..open })
        });
    }

    fn write(&mut self, line: &[u8]) -> Result<(), SinkError> {
        let LogFile { path, max_size, keep } = &self.config;
        let length = line.len() as u64;
        let mut open = match self.open.take() {
            Some(open) => open,
            None => open_file(path)?,
        };
        if open.size > 0 && open.size + length > *max_size {
            rotate(path, *keep)?;
            open = open_file(path)?;
        }
        match open.file.write_all(line) {
            Ok(()) => {
                open.size += length;
                self.open = Some(open);
                Ok(())
            }
            Err(error) => {
                // A part of the line may be written, as on a full disk. The next attempt opens the file again.
                let _failed = open.file.set_len(open.size);
                Err(io_failed("write to", &path.display())(error))
            }
        }
    }
}

/// Opens the file for appending, and creates it and its directory if they are missing. Follows neither a symlink nor a hard link
/// at `path`, with which another user could redirect the records.
fn open_file(path: &Path) -> Result<OpenFile, SinkError> {
    check_directories(path)?;
    let failed = |error| io_failed("open", &path.display())(error);
    let file = match try_open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            if let Some(directory) = path.parent() {
                let made = fs::DirBuilder::new().recursive(true).mode(DIRECTORY_MODE).create(directory);
                made.map_err(io_failed("create", &directory.display()))?;
            }
            try_open(path).map_err(failed)?
        }
        opened => opened.map_err(failed)?,
    };
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(SinkError::NotAFile(path.to_owned()));
    }
    let unsafe_file = |reason| Err(SinkError::Unsafe { path: path.to_owned(), reason });
    if metadata.nlink() != 1 {
        return unsafe_file("has other names (hard links)");
    }
    if metadata.uid() != geteuid().as_raw() {
        return unsafe_file("belongs to another user");
    }
    Ok(OpenFile { file, id: (metadata.dev(), metadata.ino()), size: metadata.len() })
}

/// Checks that only root and the agent's user can replace the directories of the path. Others may write to a directory of root
/// that has the sticky bit, like `/tmp`, or that belongs to a group, like `/var/log`.
fn check_directories(path: &Path) -> Result<(), SinkError> {
    for directory in path.ancestors().skip(1) {
        let failed = |error| io_failed("open", &directory.display())(error);
        let link = match fs::symlink_metadata(directory) {
            // Missing directories are created later.
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            found => found.map_err(failed)?,
        };
        let target = fs::metadata(directory).map_err(failed)?;
        let unsafe_directory = |reason| Err(SinkError::Unsafe { path: directory.to_owned(), reason });
        let own = geteuid().as_raw();
        if [link.uid(), target.uid()].into_iter().any(|owner| owner != 0 && owner != own) {
            return unsafe_directory("belongs to another user");
        }
        let (mode, is_sticky) = (target.mode(), target.mode() & libc::S_ISVTX != 0);
        if (mode & 0o002 != 0 && !is_sticky) || (mode & 0o022 != 0 && target.uid() != 0) {
            return unsafe_directory("can be changed by other users");
        }
    }
    Ok(())
}

fn try_open(path: &Path) -> io::Result<File> {
    // Without O_NONBLOCK, a FIFO at the path would block until a process reads it.
    let mut options = OpenOptions::new();
    options.append(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).mode(FILE_MODE);
    match options.clone().create_new(true).open(path) {
        Ok(file) => {
            // The umask of the systemd unit removes the rights of the group.
            file.set_permissions(fs::Permissions::from_mode(FILE_MODE))?;
            Ok(file)
        }
        Err(error) if error.kind() == ErrorKind::AlreadyExists => options.open(path),
        Err(error) => Err(error),
    }
}

/// Renames the file to `PATH.1` and each rotated file to the next number. The last one is replaced.
fn rotate(path: &Path, keep: u32) -> Result<(), SinkError> {
    for number in (0..keep).rev() {
        let (from, to) = (rotated(path, number), rotated(path, number + 1));
        match fs::rename(&from, &to) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(io_failed("rename", &from.display())(error)),
        }
    }
    Ok(())
}

/// Returns the path of the rotated file with this number. 0 is the current file.
fn rotated(path: &Path, number: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    if number > 0 {
        name.push(format!(".{number}"));
    }
    name.into()
}
