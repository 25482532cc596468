//! Ownership of a pin directory: checks that a directory belongs to imds-agent before it is used or removed.

use std::{
    ffi::OsStr,
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::AsFd as _,
        unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
};

use imds_ebpf_common::TcHook;
use imds_ebpf_common::names::{
    HOST_LINKS, LOCAL_SERVICE_LINK, MAPS, NODE_LINKS, PREFIX, SOCKET_LINKS, link_prefix, programs,
};
use nix::sys::statfs::fstatfs;

use super::{
    dir::{BPFFS_MAGIC, PinDir, PinError, REPLACEMENT_SUFFIX, io_error},
    unload_request::REQUEST,
};
use crate::datapath::{
    maps::request_log::REQUEST_MAPS,
    sys::{bpf, rcu::RECORD},
};

/// Kind of the pins in one subdirectory of a pin directory.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum PinKind {
    Map,
    Program,
    Link,
}

impl PinKind {
    /// All kinds, in the order in which their pins are removed.
    pub(crate) const ALL: [Self; 3] = [Self::Link, Self::Program, Self::Map];

    /// Returns the name of the subdirectory.
    pub(crate) const fn directory(self) -> &'static str {
        match self {
            Self::Map => "maps",
            Self::Program => "progs",
            Self::Link => "links",
        }
    }

    /// Reports whether the agent uses the last part of this path as the name of a pin.
    pub(crate) fn is_pin(self, path: &Path) -> bool {
        path.file_name().and_then(OsStr::to_str).is_some_and(|name| self.is_name(name))
    }

    /// Reports whether the agent uses this name for a pin. Includes names of replacements that were not renamed yet.
    fn is_name(self, name: &str) -> bool {
        let name = name.strip_suffix(REPLACEMENT_SUFFIX).unwrap_or(name);
        match self {
            Self::Map => MAPS.contains(&name) || REQUEST_MAPS.contains(&name),
            Self::Program => programs().any(|program| program == name),
            Self::Link => {
                let has_number = |prefix: &str| {
                    name.strip_prefix(prefix).is_some_and(|number| number.parse::<u64>().is_ok())
                };
                name == LOCAL_SERVICE_LINK
                    || SOCKET_LINKS.contains(&name)
                    || NODE_LINKS.contains(&name)
                    || TcHook::ALL.into_iter().any(|hook| has_number(link_prefix(hook)))
                    || HOST_LINKS.into_iter().any(|link| has_number(&format!("{link}_")))
            }
        }
    }
}

impl PinDir {
    /// Fails if the agent must not use this directory: the root of a bpffs, or a directory with pins of other programs.
    /// Succeeds if the directory does not exist yet.
    pub fn ensure_usable(&self) -> Result<(), PinError> {
        let Some(directory) = self.open_directory()? else { return Ok(()) };
        self.ensure_below_root(&directory)?;
        if self.unknown_entries()?.is_empty() || self.has_agent_pin()? {
            return Ok(());
        }
        Err(self.not_pin_dir("it contains pins of other programs and no map of imds-agent"))
    }

    /// Opens the directory if `unload` may remove it: a directory on a bpffs that contains objects of an agent, or only the
    /// empty subdirectories that agents create. Returns `None` if the path does not exist or the directory is empty.
    pub(crate) fn open_owned(&self) -> Result<Option<File>, PinError> {
        let Some(directory) = self.open_directory()? else { return Ok(None) };
        let statfs = fstatfs(&directory).map_err(|errno| io_error("inspect", self.root())(errno.into()))?;
        if statfs.filesystem_type() != BPFFS_MAGIC {
            return Err(self.not_pin_dir("it is not on a bpffs, so it contains no pins"));
        }
        self.ensure_below_root(&directory)?;
        for kind in PinKind::ALL {
            let path = self.directory(kind);
            if fs::symlink_metadata(&path).is_ok_and(|metadata| metadata.is_symlink()) {
                return Err(self.not_pin_dir("its subdirectory `maps`, `progs` or `links` is a symlink"));
            }
        }
        if self.has_agent_pin()? {
            return Ok(Some(directory));
        }
        let entries = entries(self.root())?;
        if entries.is_empty() {
            return Ok(None);
        }
        let is_empty_pin_dir = self.unknown_entries()?.is_empty() && self.has_no_pins()?;
        if is_empty_pin_dir {
            Ok(Some(directory))
        } else {
            Err(self.not_pin_dir("it contains no map of imds-agent"))
        }
    }

    /// Opens the directory without following a symlink. Returns `None` if the path does not exist.
    fn open_directory(&self) -> Result<Option<File>, PinError> {
        let flags = libc::O_DIRECTORY | libc::O_NOFOLLOW;
        match OpenOptions::new().read(true).custom_flags(flags).open(self.root()) {
            Ok(directory) => Ok(Some(directory)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTDIR | libc::ELOOP)) => {
                Err(self.not_pin_dir("it is a symlink, or not a directory"))
            }
            Err(error) => Err(io_error("open", self.root())(error)),
        }
    }

    /// Fails at the root of a file system, which is shared by all programs.
    fn ensure_below_root(&self, directory: &File) -> Result<(), PinError> {
        let device = |metadata: io::Result<fs::Metadata>| metadata.map(|metadata| metadata.dev());
        let inside = device(directory.metadata()).map_err(io_error("inspect", self.root()))?;
        let above = self.root().join("..");
        let outside = device(fs::metadata(&above)).map_err(io_error("inspect", &above))?;
        if inside == outside {
            return Ok(());
        }
        Err(self.not_pin_dir("it is a mount point, such as the root of a bpffs, which all programs share"))
    }

    fn not_pin_dir(&self, reason: &'static str) -> PinError {
        PinError::NotPinDir { path: self.root().to_owned(), reason }
    }

    /// Returns the entries of the directory that agents do not create.
    fn unknown_entries(&self) -> Result<Vec<PathBuf>, PinError> {
        let is_known = |path: &PathBuf| {
            let name = path.file_name().unwrap_or_default();
            name == REQUEST || name == RECORD || PinKind::ALL.into_iter().any(|kind| name == kind.directory())
        };
        Ok(entries(self.root())?.into_iter().filter(|path| !is_known(path)).collect())
    }

    fn has_no_pins(&self) -> Result<bool, PinError> {
        for kind in PinKind::ALL {
            if !entries(&self.directory(kind))?.is_empty() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Reports whether the directory contains a pin of an agent's map, program or link, under a name that agents use.
    fn has_agent_pin(&self) -> Result<bool, PinError> {
        for kind in PinKind::ALL {
            let directory = self.directory(kind);
            if fs::symlink_metadata(&directory).is_ok_and(|metadata| metadata.is_symlink()) {
                continue;
            }
            for path in entries(&directory)? {
                if kind.is_pin(&path) && is_agent_object(&path) {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }
}

/// Reports whether the object that is pinned at `path` belongs to an agent, by its name. Does not follow symlinks.
pub(crate) fn is_agent_object(path: &Path) -> bool {
    if !fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_file()) {
        return false;
    }
    let Ok(object) = bpf::get(path) else { return false };
    bpf::object_name(object.as_fd()).is_ok_and(|name| name.is_some_and(|name| name.starts_with(PREFIX)))
}

/// Reports whether `path` is a directory. Does not follow symlinks.
pub(crate) fn is_directory(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir())
}

/// Returns the paths of the entries of a directory. Returns an empty list if it does not exist.
pub(crate) fn entries(directory: &Path) -> Result<Vec<PathBuf>, PinError> {
    match fs::read_dir(directory).and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect()) {
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Ok(Vec::new())
        }
        listed => listed.map_err(io_error("list", directory)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_pin_names_only() {
        let [map, program, link] = [PinKind::Map, PinKind::Program, PinKind::Link];
        assert!(map.is_name("imds_policy") && map.is_name("imds_policy_new") && map.is_name("AYA_LOGS"));
        assert!(map.is_name("imds_requests") && map.is_name("imds_req_counts_new"));
        assert!(!map.is_name("imds_other") && !map.is_name("cilium_policy"));
        assert!(program.is_name("imds_from_pod") && program.is_name("imds_host_out"));
        assert!(!program.is_name("from_pod_3"));
        for name in ["from_pod_3", "node_egress_12", "node_egress_12_new", "connect4", "host_egress_77"] {
            assert!(link.is_name(name), "{name}");
        }
        for name in ["from_pod_", "from_pod_x", "host_egress", "cil_from_pod_3", "connect5"] {
            assert!(!link.is_name(name), "{name}");
        }
    }
}
