//! The socket hooks: cgroup links, held and pinned like those of interfaces.

use std::{
    fs::File,
    io,
    os::{fd::OwnedFd, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
};

use imds_ebpf_common::names::{SOCKET_LINKS, SOCKET_PROGRAMS};

use super::{
    DatapathError,
    bpf::{self, SOCKET_ATTACH_TYPES, Target},
    object::Programs,
    pins::{self, PinDir},
    tcx,
};

/// The cgroup whose sockets are guarded, with all cgroups below it, and the links on it.
#[derive(Debug)]
pub(super) struct Sockets {
    path: PathBuf,
    cgroup: File,
    id: u64,
    links: [Option<OwnedFd>; SOCKET_LINKS.len()],
}

impl Sockets {
    /// Takes over what earlier agents pinned for the cgroup at `path`.
    pub(super) fn adopt(pins: &PinDir, path: &Path) -> Result<Self, DatapathError> {
        let cgroup = File::open(path).map_err(pins::io_error("open the cgroup", path))?;
        // The inode number of a cgroup is its id (kernfs).
        let id = cgroup.metadata().map_err(pins::io_error("inspect the cgroup", path))?.ino();
        let mut sockets = Self { path: path.to_owned(), cgroup, id, links: Default::default() };
        for (index, name) in SOCKET_LINKS.into_iter().enumerate() {
            let Some(fd) = pins::open(&pins.named_link(name))? else { continue };
            if sockets.is_attached(index, &fd).is_some() {
                sockets.links[index] = Some(fd);
            }
        }
        Ok(sockets)
    }

    /// Attaches what is not attached, replaces what is not this agent's, and pins what is not pinned. Returns what was
    /// done, for people.
    pub(super) fn restore(
        &mut self,
        pins: &PinDir,
        programs: &Programs,
    ) -> Result<Vec<String>, DatapathError> {
        let mut done = Vec::new();
        for (index, (name, program)) in SOCKET_LINKS.into_iter().zip(SOCKET_PROGRAMS).enumerate() {
            let path = pins.named_link(name);
            let fd = programs.fd(program)?;
            let held = self.links[index].as_ref().and_then(|fd| self.is_attached(index, fd));
            let Some(link) = held else {
                let link = bpf::link_create_cgroup(fd, &self.cgroup, SOCKET_ATTACH_TYPES[index])
                    .map_err(self.failed("attaching to"))?;
                // Over the pin of one that was detached, or of another cgroup's, which ends with it.
                pins::pin_over(&link, &path)?;
                self.links[index] = Some(link);
                done.push(format!("guarding {name} of sockets below {}", self.path.display()));
                continue;
            };
            let Some(held) = &self.links[index] else { continue };
            if Some(link.program) != programs.id(program) {
                bpf::link_update(held, fd).map_err(self.failed("replacing a program of"))?;
                done.push(format!("guarding {name} of sockets: took over from an earlier agent"));
            }
            if !tcx::is_pinned(link.id, &path) {
                pins::pin_over(held, &path)?;
                done.push(format!("{name} of sockets: pinned again"));
            }
        }
        Ok(done)
    }

    /// The link, if it is attached to this cgroup by this hook.
    fn is_attached(&self, index: usize, fd: &OwnedFd) -> Option<bpf::Link> {
        let link = bpf::link(fd).ok().flatten()?;
        let wanted = Target::Cgroup { id: self.id, attach_type: SOCKET_ATTACH_TYPES[index] as u32 };
        (link.target == wanted).then_some(link)
    }

    fn failed(&self, operation: &'static str) -> impl FnOnce(io::Error) -> DatapathError {
        let path = self.path.clone();
        move |source| DatapathError::Cgroup { operation, path, source }
    }
}

/// Detaches and unpins the links, wherever they are. Returns whether one was attached.
pub(super) fn detach_all(pins: &PinDir) -> Result<bool, DatapathError> {
    let mut was_attached = false;
    for name in SOCKET_LINKS {
        let path = pins.named_link(name);
        if let Some(fd) = pins::open(&path)?
            && let Ok(Some(link)) = bpf::link(&fd)
            && let Target::Cgroup { id: 1.., .. } = link.target
        {
            let failed =
                |source| DatapathError::Cgroup { operation: "detaching from", path: path.clone(), source };
            bpf::link_detach(&fd).map_err(failed)?;
            was_attached = true;
        }
        pins::unpin(&path)?;
    }
    Ok(was_attached)
}

/// Names of those links that are not pinned, or not attached to anything.
#[must_use]
pub fn missing(pins: &PinDir) -> Vec<&'static str> {
    let is_missing = |name: &&str| {
        let link =
            pins::open(&pins.named_link(name)).ok().flatten().and_then(|fd| bpf::link(fd).ok().flatten());
        !link.is_some_and(|link| matches!(link.target, Target::Cgroup { id: 1.., .. }))
    };
    SOCKET_LINKS.into_iter().filter(is_missing).collect()
}
