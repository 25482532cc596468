//! Last good configuration on disk, for a start with an unusable configuration file.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use nix::unistd::geteuid;
use thiserror::Error;

use crate::checksum::fnv1a;

const FILE_NAME: &str = "last-good.toml";
/// First line up to the checksum. The line is a TOML comment, so that `imds-agent config check` can read the stored
/// file.
const HEADER: &str = "# imds-agent last good configuration, format 1, checksum ";
/// Upper bound of the size: 1 MiB for the configuration file, plus the header lines.
const MAX_LEN: u64 = (1 << 20) + (8 << 10);

/// Reason why the last good configuration cannot be stored or used.
#[derive(Debug, Error)]
pub enum LastGoodError {
    /// A system call returned an error.
    #[error("failed to {verb} {}: {cause}", path.display())]
    Io {
        /// Operation, as a verb of the error message.
        verb: &'static str,
        /// File or directory that the operation accesses.
        path: PathBuf,
        /// Error of the system call.
        cause: io::Error,
    },
    /// The stored file is damaged, or was not written by the agent for this configuration file.
    #[error("failed to use {}: {reason}", path.display())]
    Unusable {
        /// Path of the stored file.
        path: PathBuf,
        /// Defect that makes the file unusable.
        reason: &'static str,
    },
}

/// Directory with the last good configuration of one node.
#[derive(Clone, Debug)]
pub struct LastGoodStore {
    dir: PathBuf,
}

impl LastGoodStore {
    /// Creates a store in `dir`. The directory is created when a configuration is written.
    pub fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Returns the path of the stored file.
    pub fn path(&self) -> PathBuf {
        self.dir.join(FILE_NAME)
    }

    /// Reads the stored text of the configuration file `of`, or returns `None` if nothing is stored. The text includes
    /// the header, so that line numbers in errors match the stored file.
    pub fn read(&self, of: &Path) -> Result<Option<String>, LastGoodError> {
        let path = self.path();
        let text = match read_private(&path) {
            Ok(Ok(text)) => text,
            Ok(Err(reason)) => return Err(LastGoodError::Unusable { path, reason }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(cause) => return Err(LastGoodError::Io { verb: "read", path, cause }),
        };
        match check(&text, of) {
            Ok(()) => Ok(Some(text)),
            Err(reason) => Err(LastGoodError::Unusable { path, reason }),
        }
    }

    /// Stores `text` of the configuration file `of`. If that fails, removes the previously stored text, because it
    /// could contain exemptions that `text` no longer has.
    pub fn write(&self, of: &Path, text: &str) -> Result<(), LastGoodError> {
        let text = with_header(text, of);
        if matches!(read_private(&self.path()), Ok(Ok(stored)) if stored == text) {
            return Ok(());
        }
        let written = self.replace(&text);
        if written.is_err() {
            self.remove()?;
        }
        written
    }

    /// Removes the stored file, and the directory if it is empty. Returns whether a file was stored.
    pub fn remove(&self) -> Result<bool, LastGoodError> {
        let path = self.path();
        let removed = match fs::remove_file(&path) {
            Ok(()) => true,
            // A read-only file system fails with EROFS also if the file does not exist.
            Err(_) if is_missing(&path) => false,
            Err(cause) => return Err(LastGoodError::Io { verb: "remove", path, cause }),
        };
        // Fails for a directory with other files and for a mount point. Both stay.
        let _is_kept = fs::remove_dir(&self.dir);
        Ok(removed)
    }

    fn replace(&self, text: &str) -> Result<(), LastGoodError> {
        let (path, new) = (self.path(), self.path().with_extension("new"));
        let failed = |verb, path: &Path| {
            let path = path.to_owned();
            move |cause| LastGoodError::Io { verb, path, cause }
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.dir)
            .map_err(failed("create", &self.dir))?;
        // Left by an agent that was killed while it wrote.
        let _leftover = fs::remove_file(&new);
        let write = || {
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()
        };
        write().map_err(failed("write", &new))?;
        fs::rename(&new, &path).map_err(failed("replace", &path))?;
        File::open(&self.dir).and_then(|dir| dir.sync_all()).map_err(failed("write", &self.dir))
    }
}

/// Reads a file that no other user can have written. The inner error is the defect of a readable file.
fn read_private(path: &Path) -> io::Result<Result<String, &'static str>> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Ok(Err("it is not a regular file"));
    }
    if metadata.uid() != geteuid().as_raw() || metadata.mode() & 0o077 != 0 {
        return Ok(Err("other users can access it"));
    }
    let mut bytes = Vec::new();
    if file.take(MAX_LEN + 1).read_to_end(&mut bytes)? as u64 > MAX_LEN {
        return Ok(Err("it is too long"));
    }
    Ok(String::from_utf8(bytes).map_err(|_| "it is not UTF-8"))
}

fn with_header(text: &str, of: &Path) -> String {
    let body = format!("{}\n{text}", file_line(of));
    format!("{HEADER}{:016x}\n{body}", fnv1a(&body))
}

/// Returns the second line, which names the configuration file of the text, with control characters escaped.
fn file_line(of: &Path) -> String {
    format!("# file {}", of.display().to_string().escape_debug())
}

/// Checks header and checksum. The checksum detects damage only: owner and mode of the file keep other users out.
fn check(text: &str, of: &Path) -> Result<(), &'static str> {
    let (header, body) = text.split_once('\n').ok_or("it has no header")?;
    let sum = header.strip_prefix(HEADER).ok_or("it has no header of this version")?;
    if sum != format!("{:016x}", fnv1a(body)) {
        return Err("its checksum is wrong");
    }
    if body.lines().next() != Some(file_line(of).as_str()) {
        return Err("it belongs to another configuration file");
    }
    Ok(())
}

/// Reports whether no file exists at `path`. False if that is unknown.
fn is_missing(path: &Path) -> bool {
    use io::ErrorKind::{NotADirectory, NotFound};
    fs::symlink_metadata(path).is_err_and(|error| matches!(error.kind(), NotFound | NotADirectory))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    const FILE: &str = "/etc/imds-agent/imds.toml";

    fn reason(store: &LastGoodStore) -> String {
        store.read(Path::new(FILE)).unwrap_err().to_string()
    }

    #[test]
    fn stored_text_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let store = LastGoodStore::new(dir.path().join("a/b"));
        assert!(store.read(Path::new(FILE)).unwrap().is_none());
        for text in ["", "mode = 'audit'\n", "# comment"] {
            store.write(Path::new(FILE), text).unwrap();
            let stored = store.read(Path::new(FILE)).unwrap().unwrap();
            assert!(stored.ends_with(&format!("\n{text}")), "{stored}");
            assert!(stored.parse::<toml::Table>().is_ok(), "{stored}");
        }
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
        assert_eq!((mode(&store.path()), mode(&dir.path().join("a/b"))), (0o600, 0o700));
        assert_eq!(fs::read_dir(dir.path().join("a/b")).unwrap().count(), 1);
        assert!(store.remove().unwrap() && !store.remove().unwrap());
        assert!(!dir.path().join("a/b").exists());
    }

    #[test]
    fn damaged_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let store = LastGoodStore::new(dir.path().to_owned());
        let path = store.path();
        store.write(Path::new(FILE), "mode = 'audit'\n").unwrap();
        let good = fs::read_to_string(&path).unwrap();
        for (text, expected) in [
            (String::new(), "header"),
            ("mode = 'off'\n".to_owned(), "header"),
            (good.replace("format 1", "format 2"), "this version"),
            (good.replace("audit", "off"), "checksum"),
            (good.split_at(good.len() - 1).0.to_owned(), "checksum"),
            (with_header("", Path::new("/other")), "another configuration file"),
            (" ".repeat(1 << 21), "too long"),
        ] {
            fs::write(&path, text).unwrap();
            assert!(reason(&store).contains(expected), "{}", reason(&store));
        }
        fs::write(&path, [0xff]).unwrap();
        assert!(reason(&store).contains("UTF-8"));
        fs::write(&path, &good).unwrap();
        assert!(store.read(Path::new(FILE)).unwrap().is_some());
        fs::set_permissions(&path, fs::Permissions::from_mode(0o620)).unwrap();
        assert!(reason(&store).contains("other users"));
        fs::rename(&path, dir.path().join("elsewhere")).unwrap();
        std::os::unix::fs::symlink("elsewhere", &path).unwrap();
        assert!(reason(&store).contains("failed to read"), "{}", reason(&store));
    }

    #[test]
    fn failed_write_removes_older_text() {
        let dir = tempfile::tempdir().unwrap();
        let store = LastGoodStore::new(dir.path().to_owned());
        store.write(Path::new(FILE), "mode = 'audit'\n").unwrap();
        // A directory with a file in it can't be removed by remove_file(3), nor written to.
        fs::create_dir(store.path().with_extension("new")).unwrap();
        let error = store.write(Path::new(FILE), "mode = 'enforce'\n").unwrap_err();
        assert!(error.to_string().starts_with("failed to write "), "{error}");
        assert!(store.read(Path::new(FILE)).unwrap().is_none());
    }
}
