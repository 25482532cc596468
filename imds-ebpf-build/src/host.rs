//! Search for programs on the build machine.

use std::{
    env,
    ffi::{OsStr, OsString},
    iter,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

/// Root directory and search path of the build machine, or of a directory tree that a test created.
#[derive(Clone, Debug)]
pub struct Host {
    root: PathBuf,
    path: OsString,
    cargo_bins: Vec<PathBuf>,
}

impl Host {
    /// Returns the machine and the environment of this process.
    pub fn current() -> Self {
        let bin_below = |variable, dir| Some(PathBuf::from(env::var_os(variable)?).join(dir));
        Self {
            root: PathBuf::from("/"),
            path: env::var_os("PATH").unwrap_or_default(),
            // The directories of `cargo install`, which are not on the PATH of `sudo` and systemd.
            cargo_bins: [
                bin_below("CARGO_INSTALL_ROOT", "bin"),
                bin_below("CARGO_HOME", "bin"),
                bin_below("HOME", ".cargo/bin"),
            ]
            .into_iter()
            .flatten()
            .collect(),
        }
    }

    /// Returns a machine whose files are below `root`, with `bin` as its PATH.
    pub fn below(root: &Path) -> Self {
        Self { root: root.to_owned(), path: root.join("bin").into_os_string(), cargo_bins: Vec::new() }
    }

    /// Returns the first program with this name on the PATH, in the directories of `cargo install`, or in the `sbin`
    /// directories, which are not on the PATH of unprivileged users.
    pub fn find(&self, program: &str) -> Option<PathBuf> {
        self.find_all(program).next()
    }

    /// Returns all programs with this name, in the order of [`Host::find`]. `program` may be an absolute path.
    pub fn find_all(&self, program: &str) -> impl Iterator<Item = PathBuf> {
        let dirs = env::split_paths(&self.path).chain(self.cargo_bins.iter().cloned());
        let dirs = dirs.chain(["usr/local/sbin", "usr/sbin", "sbin"].map(|dir| self.root.join(dir)));
        let is_path = Path::new(program).is_absolute();
        dirs.map(move |dir| if is_path { self.file(program) } else { dir.join(program) })
            .filter(|path| is_executable(path))
    }

    /// Returns the path of the file that has the absolute path `path` on this machine.
    pub fn file(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    /// Returns the PATH with `dir` as first directory.
    pub fn path_after(&self, dir: &Path) -> OsString {
        prepended(dir, &self.path)
    }
}

/// Reports whether `path` is a regular file with an execute permission for any user.
fn is_executable(path: &Path) -> bool {
    path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

fn prepended(dir: &Path, path: &OsStr) -> OsString {
    // A directory with a colon in its name cannot be on a PATH.
    env::join_paths(iter::once(dir.to_owned()).chain(env::split_paths(path)))
        .unwrap_or_else(|_| path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_dirs_with_space_and_colon() {
        let path = OsStr::new("/usr/bin:/bin");
        assert_eq!(prepended(Path::new("/home/a user/bin"), path), "/home/a user/bin:/usr/bin:/bin");
        assert_eq!(prepended(Path::new("/a:b"), path), path);
    }
}
