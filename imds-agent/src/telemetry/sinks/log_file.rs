//! Sink that writes JSON lines to a file, which it rotates by size.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, ErrorKind, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
};

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

/// Opens the file for appending, and creates it and its directory if they are missing. Does not follow a symlink at `path`,
/// with which the owner of the directory could redirect the records.
fn open_file(path: &Path) -> Result<OpenFile, SinkError> {
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
    Ok(OpenFile { file, id: (metadata.dev(), metadata.ino()), size: metadata.len() })
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
