//! Links of the agent on hooks that run a list of programs (TCX and netkit): open and pinned.

use std::{
    collections::BTreeMap,
    fs, io,
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::Path,
};

use imds_ebpf_common::{AttachMode, TcHook};

use super::{
    DatapathError,
    bpf::{self, Direction, MprogHook, Target},
    pins::{self, AttachPoint, PinDir, PinError},
};
use crate::reconcile::{Attachment, Order};

/// Attach modes that are links, in the order in which their programs run.
const MODES: [AttachMode; 2] = [AttachMode::Netkit, AttachMode::Tcx];

/// Reports whether the link with this id, of which the kernel names `ifindex`, is attached at `point`.
///
/// Of a link at a netkit peer the kernel names the peer, by its index in the pod's network namespace (`netkit_dev_fetch`,
/// drivers/net/netkit.c): the list of programs of the primary device decides.
fn is_link_at(point: AttachPoint, id: u32, ifindex: u32, hook: MprogHook) -> bool {
    match hook {
        MprogHook::Tcx(_) | MprogHook::NetkitPrimary => ifindex == point.ifindex,
        MprogHook::NetkitPeer => {
            let entries = bpf::entries(point.ifindex, hook).unwrap_or_default();
            entries.iter().any(|entry| entry.link == id)
        }
    }
}

/// The links of this process. Each is pinned and open, so that it stays attached if another program removes its pin.
///
/// An attach point has links of two modes only while one takes over from the other: both have the same pin.
#[derive(Debug, Default)]
pub(super) struct Links {
    links: BTreeMap<(AttachPoint, AttachMode), OpenLink>,
}

#[derive(Debug)]
struct OpenLink {
    fd: OwnedFd,
    id: u32,
    /// Inode number of the pin when it was last seen to be this link's: no other pin on that bpffs has the same.
    pin: Option<u64>,
}

impl Links {
    /// Adopts the links that earlier agents pinned. Removes pins of other objects.
    pub(super) fn adopt(pins: &PinDir) -> Result<Self, PinError> {
        let mut links = BTreeMap::new();
        for (point, path) in pins.pinned_links()? {
            let Some(fd) = pins::open(&path)? else { continue };
            let found = bpf::link(&fd);
            let description = format!("{found:?}");
            let link = found.ok().flatten().filter(|link| !bpf::is_foreign(link.program));
            let mode = |hook| MODES.into_iter().find(|&mode| mprog_hook(point.edge, mode) == Some(hook));
            match link.map(|link| (link.id, link.target)) {
                Some((id, Target::Interface { ifindex, hook }))
                    if mode(hook).is_some() && is_link_at(point, id, ifindex, hook) =>
                {
                    let mode = mode(hook).unwrap_or_default();
                    links.insert((point, mode), OpenLink { fd, id, pin: None });
                }
                // Detached: its interface was deleted.
                Some((_, Target::Interface { ifindex: 0, .. })) => pins::unpin(&path)?,
                Some(_) | None => {
                    log::warn!(
                        "removed {}: an agent has not pinned it for this interface ({description})",
                        path.display()
                    );
                    pins::unpin(&path)?;
                }
            }
        }
        Ok(Self { links })
    }

    pub(super) fn indices(&self) -> impl Iterator<Item = u32> {
        self.links.keys().map(|(point, _)| point.ifindex)
    }

    /// Asks the kernel for the state of the links at `point`, on which `program` should run. Forgets links that were
    /// detached.
    pub(super) fn observe(
        &mut self,
        pins: &PinDir,
        point: AttachPoint,
        program: u32,
    ) -> Result<Vec<Attachment>, DatapathError> {
        let mut attachments = Vec::new();
        for mode in MODES {
            let Some(link) = self.links.get_mut(&(point, mode)) else { continue };
            let entries = programs(point, mode)?;
            let found = entries.iter().enumerate().find(|(_, entry)| entry.link == link.id);
            let Some((position, entry)) = found else {
                self.forget_mode(pins, point, mode)?;
                continue;
            };
            attachments.push(Attachment {
                backend: mode,
                current: entry.program == program,
                pinned: link.is_pinned(&pins.link(point)),
                place: order(&entries, position),
            });
        }
        Ok(attachments)
    }

    /// Attaches `program` before all others.
    pub(super) fn attach(
        &mut self,
        pins: &PinDir,
        point: AttachPoint,
        mode: AttachMode,
        program: BorrowedFd<'_>,
    ) -> Result<(), DatapathError> {
        let fd = create_first(point, mode, program)?;
        self.insert(pins, point, mode, fd)
    }

    /// Replaces the link's program, with no moment without one.
    pub(super) fn replace(
        &mut self,
        point: AttachPoint,
        mode: AttachMode,
        program: BorrowedFd<'_>,
    ) -> Result<(), DatapathError> {
        let link = self.get(point, mode)?;
        bpf::link_update(&link.fd, program).map_err(failed("replace the program of the", point, mode))
    }

    /// Pins the link again.
    pub(super) fn pin(
        &mut self,
        pins: &PinDir,
        point: AttachPoint,
        mode: AttachMode,
    ) -> Result<(), DatapathError> {
        let link = self.get(point, mode)?;
        Ok(pins::pin_over(&link.fd, &pins.link(point))?)
    }

    /// Attaches `copy` before all others and detaches the link that was there.
    pub(super) fn reorder(
        &mut self,
        pins: &PinDir,
        point: AttachPoint,
        mode: AttachMode,
        copy: BorrowedFd<'_>,
    ) -> Result<(), DatapathError> {
        let fd = create_first(point, mode, copy)?;
        let before = self.links.remove(&(point, mode));
        self.insert(pins, point, mode, fd)?;
        match before {
            Some(link) => bpf::link_detach(&link.fd).map_err(failed("detach the", point, mode)),
            None => Ok(()),
        }
    }

    /// Detaches the link.
    pub(super) fn detach(
        &mut self,
        pins: &PinDir,
        point: AttachPoint,
        mode: AttachMode,
    ) -> Result<(), DatapathError> {
        let link = self.get(point, mode)?;
        bpf::link_detach(&link.fd).map_err(failed("detach the", point, mode))?;
        Ok(self.forget_mode(pins, point, mode)?)
    }

    /// Closes and unpins the links of an interface that was deleted.
    pub(super) fn forget(&mut self, pins: &PinDir, point: AttachPoint) -> Result<(), PinError> {
        for mode in MODES {
            self.links.remove(&(point, mode));
        }
        pins::unpin(&pins.link(point))
    }

    /// Closes a detached link. Keeps the pin if it is a link of another mode that took over.
    fn forget_mode(&mut self, pins: &PinDir, point: AttachPoint, mode: AttachMode) -> Result<(), PinError> {
        self.links.remove(&(point, mode));
        let path = pins.link(point);
        let is_pin = |link: &OpenLink| is_pinned(link.id, &path);
        let has_successor = MODES.into_iter().filter_map(|mode| self.links.get(&(point, mode))).any(is_pin);
        if has_successor { Ok(()) } else { pins::unpin(&path) }
    }

    fn insert(
        &mut self,
        pins: &PinDir,
        point: AttachPoint,
        mode: AttachMode,
        fd: OwnedFd,
    ) -> Result<(), DatapathError> {
        let link = bpf::link(&fd).map_err(failed("describe the", point, mode))?;
        let id = link.map_or(0, |link| link.id);
        // Kept open before it is pinned: if pinning fails, it stays attached while this process lives.
        let link = self.links.entry((point, mode)).insert_entry(OpenLink { fd, id, pin: None });
        Ok(pins::pin_over(&link.get().fd, &pins.link(point))?)
    }

    fn get(&self, point: AttachPoint, mode: AttachMode) -> Result<&OpenLink, DatapathError> {
        let missing = || failed("find the", point, mode)(io::ErrorKind::NotFound.into());
        self.links.get(&(point, mode)).ok_or_else(missing)
    }
}

impl OpenLink {
    /// Reports whether the link is pinned at `path`. Each resync asks this of every link, so that the pin is opened only if
    /// it is another file than last time.
    fn is_pinned(&mut self, path: &Path) -> bool {
        let inode = fs::metadata(path).ok().map(|metadata| metadata.ino());
        if inode.is_none() || inode != self.pin {
            self.pin = inode.filter(|_| is_pinned(self.id, path));
        }
        self.pin.is_some()
    }
}

/// Returns the order of the program at `position`. A program of a second imds-agent may run before it, because that one passes
/// packets to the next program: two agents that each wanted to be first would reorder their programs for ever.
fn order(entries: &[bpf::Entry], position: usize) -> Order {
    if entries.iter().take(position).all(|entry| bpf::is_ours(entry.program)) {
        Order::First
    } else {
        Order::NotFirst
    }
}

/// Lists all programs at the hook that `mode` attaches to, in the order in which they run.
pub(super) fn programs(point: AttachPoint, mode: AttachMode) -> Result<Vec<bpf::Entry>, DatapathError> {
    let hook = required_hook(point, mode)?;
    bpf::entries(point.ifindex, hook).map_err(failed("list the programs before the", point, mode))
}

/// Finds the attached link of an interface, pinned or with this `program`, for processes without open links. A program that
/// runs earlier is named first.
pub fn find(pins: &PinDir, point: AttachPoint, program: u32) -> Result<Option<Attachment>, PinError> {
    let pinned = pins::open(&pins.link(point))?.and_then(|fd| bpf::link(fd).ok().flatten());
    let is_pinned = |entry: &bpf::Entry| pinned.is_some_and(|pinned| pinned.id == entry.link);
    let is_ours = |entry: &bpf::Entry| is_pinned(entry) || entry.program == program;
    let mut is_preceded = false;
    for mode in MODES {
        let Some(hook) = mprog_hook(point.edge, mode) else { continue };
        // A kernel or an interface without the hook answers with an error: then it has no program.
        let entries = bpf::entries(point.ifindex, hook).unwrap_or_default();
        if let Some((position, entry)) = entries.iter().enumerate().find(|(_, entry)| is_ours(entry)) {
            let place = if is_preceded { Order::Blocked } else { order(&entries, position) };
            let (current, pinned) = (entry.program == program, is_pinned(entry));
            return Ok(Some(Attachment { backend: mode, current, pinned, place }));
        }
        is_preceded |= !entries.is_empty();
    }
    Ok(None)
}

/// Detaches the agent's link that is pinned at `path`, at once, and unpins it. Returns whether it was attached.
pub(super) fn detach_pinned(path: &Path) -> Result<bool, DatapathError> {
    let mut was_attached = false;
    if let Some((fd, link)) = pins::open_own_link(path)
        && let Target::Interface { ifindex: ifindex @ 1.., .. } = link.target
    {
        let failed =
            |source| DatapathError::Link { operation: "detach the", mode: "pinned", ifindex, source };
        bpf::link_detach(&fd).map_err(failed)?;
        was_attached = true;
    }
    pins::unpin(path)?;
    Ok(was_attached)
}

/// Reports whether the link with this id is pinned at `path`.
pub(super) fn is_pinned(id: u32, path: &Path) -> bool {
    pins::link_at(path).is_some_and(|link| link.id == id)
}

/// The list of programs that a link of this mode joins, or `None` if the mode attaches no link there.
#[must_use]
pub fn mprog_hook(hook: TcHook, mode: AttachMode) -> Option<MprogHook> {
    match (hook, mode) {
        (TcHook::FromPod, AttachMode::Tcx) => Some(MprogHook::Tcx(Direction::Ingress)),
        (TcHook::NodeEgress, AttachMode::Tcx) => Some(MprogHook::Tcx(Direction::Egress)),
        (TcHook::FromPod, AttachMode::Netkit) => Some(MprogHook::NetkitPeer),
        // Packets of the node to the pod's device, which is no way out of the node.
        (TcHook::NodeEgress, AttachMode::Netkit)
        | (TcHook::FromPod | TcHook::NodeEgress, AttachMode::None | AttachMode::Clsact) => None,
    }
}

impl AttachPoint {
    /// Direction of the packets at this point, as the node sees it.
    #[must_use]
    pub fn direction(self) -> Direction {
        match self.edge {
            TcHook::FromPod => Direction::Ingress,
            TcHook::NodeEgress => Direction::Egress,
        }
    }
}

fn create_first(
    point: AttachPoint,
    mode: AttachMode,
    program: BorrowedFd<'_>,
) -> Result<OwnedFd, DatapathError> {
    let hook = required_hook(point, mode)?;
    bpf::link_create_first(program, point.ifindex, hook).map_err(failed("attach a", point, mode))
}

fn required_hook(point: AttachPoint, mode: AttachMode) -> Result<MprogHook, DatapathError> {
    let unsupported = || failed("attach a", point, mode)(io::ErrorKind::Unsupported.into());
    mprog_hook(point.edge, mode).ok_or_else(unsupported)
}

fn failed(
    operation: &'static str,
    point: AttachPoint,
    mode: AttachMode,
) -> impl FnOnce(io::Error) -> DatapathError {
    move |source| DatapathError::Link { operation, mode: mode.name(), ifindex: point.ifindex, source }
}
