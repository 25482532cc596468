//! TCX links, held and pinned.

use std::{
    collections::BTreeMap,
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::Path,
};

use imds_ebpf_common::{AttachMode, TcHook};

use super::{
    DatapathError,
    bpf::{self, Direction, Target},
    pins::{self, AttachPoint, PinDir, PinError},
};
use crate::reconcile::{Attachment, Order};

/// The links of this process. Each is pinned, and held too, so that a pin that somebody removes
/// takes nothing with it.
#[derive(Debug, Default)]
pub(super) struct Links {
    links: BTreeMap<AttachPoint, Held>,
}

#[derive(Debug)]
struct Held {
    fd: OwnedFd,
    id: u32,
    /// Inode number of the pin when it was last seen to be this link's: no other pin on that bpffs has the same.
    pin: Option<u64>,
}

impl Links {
    /// Takes over what earlier agents pinned. What is no link any more, or none of ours, is unpinned.
    pub(super) fn adopt(pins: &PinDir) -> Result<Self, PinError> {
        let mut links = BTreeMap::new();
        for (spot, path) in pins.pinned_links()? {
            let Some(fd) = pins::open(&path)? else { continue };
            let link = bpf::link(&fd).ok().flatten().filter(|link| !bpf::is_foreign(link.program));
            match link.map(|link| (link.id, link.target)) {
                Some((id, Target::Tcx { ifindex, direction }))
                    if ifindex == spot.ifindex && direction == spot.direction() =>
                {
                    links.insert(spot, Held { fd, id, pin: None });
                }
                // Detached: its interface is gone.
                Some((_, Target::Tcx { ifindex: 0, .. })) => pins::unpin(&path)?,
                Some(_) | None => {
                    log::warn!(
                        "{} is not a link that an agent pinned for this interface: removed",
                        path.display()
                    );
                    pins::unpin(&path)?;
                }
            }
        }
        Ok(Self { links })
    }

    pub(super) fn indices(&self) -> impl Iterator<Item = u32> {
        self.links.keys().map(|spot| spot.ifindex)
    }

    /// What the kernel says of the interface's link. One that was detached is forgotten.
    pub(super) fn observe(
        &mut self,
        pins: &PinDir,
        spot: AttachPoint,
        program: u32,
    ) -> Result<Option<Attachment>, DatapathError> {
        let Some(held) = self.links.get_mut(&spot) else { return Ok(None) };
        let entries = programs(spot)?;
        let held_entry = entries.iter().enumerate().find(|(_, entry)| entry.link == held.id);
        let Some((position, entry)) = held_entry else {
            self.forget(pins, spot)?;
            return Ok(None);
        };
        Ok(Some(Attachment {
            backend: AttachMode::Tcx,
            current: entry.program == program,
            pinned: held.is_pinned(&pins.link(spot)),
            place: if position == 0 { Order::First } else { Order::NotFirst },
        }))
    }

    pub(super) fn attach(
        &mut self,
        pins: &PinDir,
        spot: AttachPoint,
        program: BorrowedFd<'_>,
    ) -> Result<(), DatapathError> {
        let fd = bpf::link_create_first(program, spot.ifindex, spot.direction())
            .map_err(failed("attaching a TCX link", spot.ifindex))?;
        self.hold(pins, spot, fd)
    }

    pub(super) fn replace(
        &mut self,
        spot: AttachPoint,
        program: BorrowedFd<'_>,
    ) -> Result<(), DatapathError> {
        let held = self.held(spot)?;
        bpf::link_update(&held.fd, program).map_err(failed("replacing a TCX link's program", spot.ifindex))
    }

    pub(super) fn pin(&mut self, pins: &PinDir, spot: AttachPoint) -> Result<(), DatapathError> {
        let held = self.held(spot)?;
        Ok(pins::pin_over(&held.fd, &pins.link(spot))?)
    }

    /// Attaches `copy` before all others and lets the link there go.
    pub(super) fn raise(
        &mut self,
        pins: &PinDir,
        spot: AttachPoint,
        copy: BorrowedFd<'_>,
    ) -> Result<(), DatapathError> {
        let fd = bpf::link_create_first(copy, spot.ifindex, spot.direction())
            .map_err(failed("attaching a TCX link", spot.ifindex))?;
        let before = self.links.remove(&spot);
        self.hold(pins, spot, fd)?;
        match before {
            Some(held) => bpf::link_detach(&held.fd).map_err(failed("detaching a TCX link", spot.ifindex)),
            None => Ok(()),
        }
    }

    pub(super) fn detach(&mut self, pins: &PinDir, spot: AttachPoint) -> Result<(), DatapathError> {
        let held = self.held(spot)?;
        bpf::link_detach(&held.fd).map_err(failed("detaching a TCX link", spot.ifindex))?;
        Ok(self.forget(pins, spot)?)
    }

    /// Lets go of a link that is detached, or whose interface is gone.
    pub(super) fn forget(&mut self, pins: &PinDir, spot: AttachPoint) -> Result<(), PinError> {
        self.links.remove(&spot);
        pins::unpin(&pins.link(spot))
    }

    fn hold(&mut self, pins: &PinDir, spot: AttachPoint, fd: OwnedFd) -> Result<(), DatapathError> {
        let link = bpf::link(&fd).map_err(failed("describing a TCX link", spot.ifindex))?;
        let id = link.map_or(0, |link| link.id);
        // Held before it is pinned: where that fails the interface is guarded all the same while this process lives.
        let held = self.links.entry(spot).insert_entry(Held { fd, id, pin: None });
        Ok(pins::pin_over(&held.get().fd, &pins.link(spot))?)
    }

    fn held(&self, spot: AttachPoint) -> Result<&Held, DatapathError> {
        let missing = || failed("finding the TCX link", spot.ifindex)(io::ErrorKind::NotFound.into());
        self.links.get(&spot).ok_or_else(missing)
    }
}

impl Held {
    /// Whether it is pinned at `path`. Asked of every link with each look at everything: the name alone says it as long as
    /// it is the same file.
    fn is_pinned(&mut self, path: &Path) -> bool {
        let inode = fs::metadata(path).ok().map(|metadata| metadata.ino());
        if inode.is_none() || inode != self.pin {
            self.pin = inode.filter(|_| is_pinned(self.id, path));
        }
        self.pin.is_some()
    }
}

/// All programs of a hook, in the order in which they run.
pub(super) fn programs(spot: AttachPoint) -> Result<Vec<bpf::Entry>, DatapathError> {
    bpf::tcx_entries(spot.ifindex, spot.direction()).map_err(failed("listing programs", spot.ifindex))
}

/// Detaches the link that is pinned at `path`, at once, and unpins it. Returns whether it was attached.
pub(super) fn detach_pinned(path: &Path) -> Result<bool, DatapathError> {
    let mut was_attached = false;
    if let Some(fd) = pins::open(path)?
        && let Ok(Some(link)) = bpf::link(fd.as_fd())
        && let Target::Tcx { ifindex: ifindex @ 1.., .. } = link.target
    {
        bpf::link_detach(&fd).map_err(failed("detaching a TCX link", ifindex))?;
        was_attached = true;
    }
    pins::unpin(path)?;
    Ok(was_attached)
}

/// Whether the link with this id is pinned at `path`.
pub(super) fn is_pinned(id: u32, path: &Path) -> bool {
    pins::link_at(path).is_some_and(|link| link.id == id)
}

impl AttachPoint {
    /// Which way packets go there.
    #[must_use]
    pub fn direction(self) -> Direction {
        match self.edge {
            TcHook::FromPod => Direction::Ingress,
            TcHook::NodeEgress => Direction::Egress,
        }
    }
}

fn failed(operation: &'static str, ifindex: u32) -> impl FnOnce(io::Error) -> DatapathError {
    move |source| DatapathError::Link { operation, ifindex, source }
}
