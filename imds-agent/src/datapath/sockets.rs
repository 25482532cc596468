//! The hooks of cgroups: their links, held and pinned like those of interfaces.

use std::{
    fs::{self, File},
    io,
    os::{fd::OwnedFd, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
};

use aya_obj::generated::bpf_attach_type::{
    self, BPF_CGROUP_INET_EGRESS, BPF_CGROUP_INET4_CONNECT, BPF_CGROUP_INET6_CONNECT,
    BPF_CGROUP_UDP4_SENDMSG, BPF_CGROUP_UDP6_SENDMSG,
};
use imds_ebpf_common::names::{HOST_LINKS, HOST_PROGRAMS, SOCKET_LINKS, SOCKET_PROGRAMS};

use super::{
    DatapathError,
    bpf::{self, Target},
    mprog,
    object::Programs,
    pins::{self, PinDir},
};

/// The links that a cgroup gets: pins, programs and hooks, in the same order.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kind {
    links: &'static [&'static str],
    programs: &'static [&'static str],
    attach_types: &'static [bpf_attach_type],
    /// Whether there can be several such cgroups, so that pins have their ids.
    is_one_of_many: bool,
}

const ATTACH_TYPES: [bpf_attach_type; 5] = [
    BPF_CGROUP_INET4_CONNECT,
    BPF_CGROUP_INET6_CONNECT,
    BPF_CGROUP_UDP4_SENDMSG,
    BPF_CGROUP_UDP6_SENDMSG,
    BPF_CGROUP_INET_EGRESS,
];

/// The cgroup whose sockets are guarded.
pub(super) const SOCKETS: Kind = Kind {
    links: &SOCKET_LINKS,
    programs: &SOCKET_PROGRAMS,
    attach_types: &ATTACH_TYPES,
    is_one_of_many: false,
};

/// One of the cgroups of Kubernetes pods.
pub(super) const HOSTS: Kind =
    Kind { links: &HOST_LINKS, programs: &HOST_PROGRAMS, attach_types: &ATTACH_TYPES, is_one_of_many: true };

/// A cgroup, which stands for all below it too, and the links on it.
#[derive(Debug)]
pub(super) struct Sockets {
    path: PathBuf,
    cgroup: File,
    id: u64,
    links: Vec<Hooked>,
}

#[derive(Debug)]
struct Hooked {
    name: &'static str,
    program: &'static str,
    attach_type: bpf_attach_type,
    pin: String,
    fd: Option<OwnedFd>,
}

impl Sockets {
    /// Takes over what earlier agents pinned for the cgroup at `path`.
    pub(super) fn adopt(pins: &PinDir, path: &Path, kind: Kind) -> Result<Self, DatapathError> {
        let cgroup = File::open(path).map_err(pins::io_error("open the cgroup", path))?;
        // The inode number of a cgroup is its id (kernfs).
        let id = cgroup.metadata().map_err(pins::io_error("inspect the cgroup", path))?.ino();
        let mut sockets = Self { path: path.to_owned(), cgroup, id, links: Vec::new() };
        let kinds = kind.links.iter().zip(kind.programs).zip(kind.attach_types);
        for ((&name, &program), &attach_type) in kinds {
            let pin = if kind.is_one_of_many { format!("{name}_{id}") } else { name.to_owned() };
            let mut hooked = Hooked { name, program, attach_type, pin, fd: None };
            if let Some(fd) = pins::open(&pins.named_link(&hooked.pin))?
                && hooked.attached(id, &fd).is_some_and(|link| !bpf::is_foreign(link.program))
            {
                hooked.fd = Some(fd);
            }
            sockets.links.push(hooked);
        }
        Ok(sockets)
    }

    /// The cgroup's id.
    pub(super) fn id(&self) -> u64 {
        self.id
    }

    /// Whether it is still the cgroup at its path.
    pub(super) fn is_there(&self) -> bool {
        fs::metadata(&self.path).is_ok_and(|metadata| metadata.ino() == self.id)
    }

    /// Attaches what is not attached, replaces what is not this agent's, and pins what is not pinned. Returns what was
    /// done, for people.
    pub(super) fn restore(
        &mut self,
        pins: &PinDir,
        programs: &Programs,
    ) -> Result<Vec<String>, DatapathError> {
        let Self { path, cgroup, id, links } = self;
        let mut done = Vec::new();
        let mut failed = None;
        for hooked in links {
            let restored = hooked.restore(pins, programs, (path, cgroup, *id), &mut done);
            failed = failed.or(restored.err());
        }
        for line in done.iter().filter(|_| failed.is_some()) {
            log::warn!("{line}");
        }
        failed.map_or(Ok(done), Err)
    }
}

impl Hooked {
    /// The same for one hook of a cgroup.
    fn restore(
        &mut self,
        pins: &PinDir,
        programs: &Programs,
        (cgroup_path, cgroup, id): (&Path, &File, u64),
        done: &mut Vec<String>,
    ) -> Result<(), DatapathError> {
        let failed = |operation| {
            let path = cgroup_path.to_owned();
            move |source| DatapathError::Cgroup { operation, path, source }
        };
        let path = pins.named_link(&self.pin);
        let fd = programs.fd(self.program)?;
        let name = self.name;
        let held = self.fd.as_ref().and_then(|fd| Some((fd, self.attached(id, fd)?)));
        let Some((held, link)) = held else {
            let link =
                bpf::link_create_cgroup(fd, cgroup, self.attach_type).map_err(failed("attaching to"))?;
            done.push(format!("guarding {name} of sockets below {}", cgroup_path.display()));
            // Held before it is pinned: where that fails sockets are guarded all the same while this process lives. Over the
            // pin of one that was detached, or of another cgroup's, which ends with it.
            return Ok(pins::pin_over(self.fd.insert(link), &path)?);
        };
        if Some(link.program) != programs.id(self.program) {
            bpf::link_update(held, fd).map_err(failed("replacing a program of"))?;
            done.push(format!("guarding {name} of sockets: took over from an earlier agent"));
        }
        if !mprog::is_pinned(link.id, &path) {
            pins::pin_over(held, &path)?;
            done.push(format!("{name} of sockets: pinned again"));
        }
        Ok(())
    }

    /// The link, if it is attached to this cgroup by this hook.
    fn attached(&self, cgroup: u64, fd: &OwnedFd) -> Option<bpf::Link> {
        let link = bpf::link(fd).ok().flatten()?;
        let wanted = Target::Cgroup { id: cgroup, attach_type: self.attach_type as u32 };
        (link.target == wanted).then_some(link)
    }
}

/// Detaches and unpins the links of the cgroup whose sockets are guarded, wherever they are. Returns whether one was
/// attached.
pub(super) fn detach_all(pins: &PinDir) -> Result<bool, DatapathError> {
    let mut was_attached = false;
    for name in SOCKET_LINKS {
        was_attached |= detach(&pins.named_link(name))?;
    }
    Ok(was_attached)
}

/// Detaches and unpins one link. Returns whether it was attached.
pub(super) fn detach(path: &Path) -> Result<bool, DatapathError> {
    let mut was_attached = false;
    if let Some(fd) = pins::open(path)?
        && let Ok(Some(link)) = bpf::link(&fd)
        && link.cgroup().is_some()
    {
        let failed = |source: io::Error| DatapathError::Cgroup {
            operation: "detaching from",
            path: path.to_owned(),
            source,
        };
        bpf::link_detach(&fd).map_err(failed)?;
        was_attached = true;
    }
    pins::unpin(path)?;
    Ok(was_attached)
}

/// Names of those links that are not pinned, or not attached to anything.
#[must_use]
pub fn missing(pins: &PinDir) -> Vec<&'static str> {
    SOCKET_LINKS.into_iter().filter(|name| !is_attached(&pins.named_link(name))).collect()
}

/// Whether the link that is pinned there is attached to a cgroup.
pub(super) fn is_attached(path: &Path) -> bool {
    pins::link_at(path).is_some_and(|link| link.cgroup().is_some())
}
