//! Links of the agent on hooks that run a list of programs (TCX and netkit). Each link is open and pinned.

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

use crate::datapath::{
    DatapathError,
    attach::attachment::{Attachment, Order},
    pin::dir::{self, AttachPoint, PinDir, PinError, io_error},
    sys::bpf::{self, MprogHook, Target},
};

/// Attach modes that use links, in the order in which their programs run.
const MODES: [AttachMode; 2] = [AttachMode::Netkit, AttachMode::Tcx];

/// Reports whether the link with this id and reported `ifindex` is attached at `point`.
///
/// For a link at a netkit peer, the kernel reports the index of the peer in the pod's network namespace (`netkit_dev_fetch`,
/// drivers/net/netkit.c). This function then searches the programs of the primary device for the link.
fn is_link_at(point: AttachPoint, id: u32, ifindex: u32, hook: MprogHook) -> bool {
    match hook {
        MprogHook::TcxIngress | MprogHook::TcxEgress | MprogHook::NetkitPrimary => ifindex == point.ifindex,
        MprogHook::NetkitPeer => {
            let entries = bpf::entries(point.ifindex, hook).unwrap_or_default();
            entries.iter().any(|entry| entry.link == id)
        }
    }
}

/// Links of this process by attach point and mode. An open link stays attached if another program removes its pin.
///
/// An attach point has links of both modes only while one replaces the other. Both use the same pin.
#[derive(Debug, Default)]
pub(crate) struct Links {
    links: BTreeMap<(AttachPoint, AttachMode), OpenLink>,
}

#[derive(Debug)]
struct OpenLink {
    fd: OwnedFd,
    id: u32,
    /// Inode number of the pin, if it was verified to belong to this link. Inode numbers are unique on the bpffs.
    pin: Option<u64>,
}

impl Links {
    /// Opens the links that earlier agents pinned. Removes pins of other objects.
    pub(crate) fn adopt(pins: &PinDir) -> Result<Self, PinError> {
        let mut links = BTreeMap::new();
        for (point, path) in pins.pinned_links()? {
            let Some(fd) = dir::open(&path)? else { continue };
            // An error does not say whose link it is: removing the pin would detach the program of an earlier agent.
            let found = bpf::link(&fd).map_err(io_error("read the link at", &path))?;
            let description = format!("{found:?}");
            let link = found.filter(|link| !bpf::is_foreign(link.program));
            let mode = |hook| MODES.into_iter().find(|&mode| mprog_hook(point.hook, mode) == Some(hook));
            match link.map(|link| (link.id, link.target)) {
                Some((id, Target::Interface { ifindex, hook }))
                    if mode(hook).is_some() && is_link_at(point, id, ifindex, hook) =>
                {
                    let mode = mode(hook).unwrap_or_default();
                    links.insert((point, mode), OpenLink { fd, id, pin: None });
                }
                // The link is detached, because its interface was deleted.
                Some((_, Target::Interface { ifindex: 0, .. })) => dir::unpin(&path)?,
                Some(_) | None => {
                    log::warn!(
                        "removed the pin {}: it is not a link of imds-agent on this interface ({description})",
                        path.display()
                    );
                    dir::unpin(&path)?;
                }
            }
        }
        Ok(Self { links })
    }

    pub(crate) fn ifindexes(&self) -> impl Iterator<Item = u32> {
        self.links.keys().map(|(point, _)| point.ifindex)
    }

    /// Reads the state of the links at `point` from the kernel. `program` is the desired program. Closes and unpins links that
    /// were detached.
    pub(crate) fn observe(
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
                self.remove_mode(pins, point, mode)?;
                continue;
            };
            let pin = pins.link(point);
            attachments.push(Attachment {
                backend: mode,
                current: entry.program == program,
                pinned: link.is_pinned(&pin) || dir::lacks_bpffs(&pin),
                order: order(&entries, position),
            });
        }
        Ok(attachments)
    }

    /// Attaches `program` at the head of the hook with a new link, and detaches the previous link of this mode.
    pub(crate) fn attach(
        &mut self,
        pins: &PinDir,
        point: AttachPoint,
        mode: AttachMode,
        program: BorrowedFd<'_>,
    ) -> Result<(), DatapathError> {
        let hook = required_hook(point, mode)?;
        let fd = bpf::link_create_first(program, point.ifindex, hook);
        let fd = fd.map_err(failed("attach a", point, mode))?;
        let id = bpf::link(&fd).map_err(failed("describe the", point, mode))?.map_or(0, |link| link.id);
        // Stores the descriptor before pinning: if pinning fails, the link stays attached while this process lives.
        let before = self.links.insert((point, mode), OpenLink { fd, id, pin: None });
        self.pin(pins, point, mode)?;
        match before {
            Some(link) => bpf::link_detach(&link.fd).map_err(failed("detach the", point, mode)),
            None => Ok(()),
        }
    }

    /// Replaces the program of the link atomically.
    pub(crate) fn replace(
        &mut self,
        point: AttachPoint,
        mode: AttachMode,
        program: BorrowedFd<'_>,
    ) -> Result<(), DatapathError> {
        let link = self.get(point, mode)?;
        bpf::link_update(&link.fd, program).map_err(failed("replace the program of the", point, mode))
    }

    /// Pins the link again after its pin was removed or replaced.
    pub(crate) fn pin(
        &mut self,
        pins: &PinDir,
        point: AttachPoint,
        mode: AttachMode,
    ) -> Result<(), DatapathError> {
        let link = self.get(point, mode)?;
        Ok(dir::replace_pin(&link.fd, &pins.link(point))?)
    }

    /// Detaches, closes and unpins the link.
    pub(crate) fn detach(
        &mut self,
        pins: &PinDir,
        point: AttachPoint,
        mode: AttachMode,
    ) -> Result<(), DatapathError> {
        let link = self.get(point, mode)?;
        bpf::link_detach(&link.fd).map_err(failed("detach the", point, mode))?;
        Ok(self.remove_mode(pins, point, mode)?)
    }

    /// Closes and unpins the links of a deleted interface.
    pub(crate) fn remove_point(&mut self, pins: &PinDir, point: AttachPoint) -> Result<(), PinError> {
        for mode in MODES {
            self.links.remove(&(point, mode));
        }
        dir::unpin(&pins.link(point))
    }

    /// Closes a detached link. Removes the pin unless it belongs to the link of another mode that replaced this one.
    fn remove_mode(&mut self, pins: &PinDir, point: AttachPoint, mode: AttachMode) -> Result<(), PinError> {
        self.links.remove(&(point, mode));
        let path = pins.link(point);
        let is_pin = |link: &OpenLink| is_pinned(link.id, &path);
        let has_successor = MODES.into_iter().filter_map(|mode| self.links.get(&(point, mode))).any(is_pin);
        if has_successor { Ok(()) } else { dir::unpin(&path) }
    }

    fn get(&self, point: AttachPoint, mode: AttachMode) -> Result<&OpenLink, DatapathError> {
        let missing = || failed("find the", point, mode)(io::ErrorKind::NotFound.into());
        self.links.get(&(point, mode)).ok_or_else(missing)
    }
}

impl OpenLink {
    /// Reports whether the link is pinned at `path`. Each resync calls this for every link, so it opens the pin only if the
    /// inode number has changed.
    fn is_pinned(&mut self, path: &Path) -> bool {
        let inode = fs::metadata(path).ok().map(|metadata| metadata.ino());
        if inode.is_none() || inode != self.pin {
            self.pin = inode.filter(|_| is_pinned(self.id, path));
        }
        self.pin.is_some()
    }
}

/// Returns the order of the program at `position`. Programs of another imds-agent may run before it, because they pass packets
/// to the next program. Otherwise two agents would reorder their programs forever.
fn order(entries: &[bpf::HookEntry], position: usize) -> Order {
    if entries.iter().take(position).all(|entry| bpf::is_agent_program(entry.program)) {
        Order::First
    } else {
        Order::NotFirst
    }
}

/// Lists all programs at the hook that `mode` attaches to, in the order in which they run.
pub(crate) fn programs(point: AttachPoint, mode: AttachMode) -> Result<Vec<bpf::HookEntry>, DatapathError> {
    let hook = required_hook(point, mode)?;
    bpf::entries(point.ifindex, hook).map_err(failed("list the programs before the", point, mode))
}

/// Finds the attached link of an interface that is pinned or has this `program`, for processes without open links. Prefers the
/// link whose program runs first.
pub fn find(pins: &PinDir, point: AttachPoint, program: u32) -> Result<Option<Attachment>, PinError> {
    let pinned = dir::open(&pins.link(point))?.and_then(|fd| bpf::link(fd).ok().flatten());
    let is_pinned = |entry: &bpf::HookEntry| pinned.is_some_and(|pinned| pinned.id == entry.link);
    let is_ours = |entry: &bpf::HookEntry| is_pinned(entry) || entry.program == program;
    let mut is_preceded = false;
    for mode in MODES {
        let Some(hook) = mprog_hook(point.hook, mode) else { continue };
        // A kernel or an interface without the hook returns an error, and has no programs.
        let entries = bpf::entries(point.ifindex, hook).unwrap_or_default();
        if let Some((position, entry)) = entries.iter().enumerate().find(|(_, entry)| is_ours(entry)) {
            let order = if is_preceded { Order::Blocked } else { order(&entries, position) };
            let (current, pinned) = (entry.program == program, is_pinned(entry));
            return Ok(Some(Attachment { backend: mode, current, pinned, order }));
        }
        is_preceded |= !entries.is_empty();
    }
    Ok(None)
}

/// Detaches and unpins the agent's link at `path`. Returns `true` if it was attached to an interface or a cgroup.
pub(crate) fn detach_pinned(path: &Path) -> Result<bool, PinError> {
    let mut was_attached = false;
    if let Some((fd, link)) = dir::open_own_link(path)
        && link.is_attached()
    {
        bpf::link_detach(&fd).map_err(io_error("detach the link at", path))?;
        was_attached = true;
    }
    dir::unpin(path)?;
    Ok(was_attached)
}

/// Reports whether the link with this id is pinned at `path`.
pub(crate) fn is_pinned(id: u32, path: &Path) -> bool {
    dir::link_at(path).is_some_and(|link| link.id == id)
}

/// Returns the hook that a link of this mode is attached to, or `None` if the mode has no link for the hook.
pub fn mprog_hook(hook: TcHook, mode: AttachMode) -> Option<MprogHook> {
    match (hook, mode) {
        (TcHook::FromPod, AttachMode::Tcx) => Some(MprogHook::TcxIngress),
        (TcHook::NodeEgress, AttachMode::Tcx) => Some(MprogHook::TcxEgress),
        (TcHook::FromPod, AttachMode::Netkit) => Some(MprogHook::NetkitPeer),
        // The primary device of a netkit pair sends packets to the pod, so it is no egress of the node.
        (TcHook::NodeEgress, AttachMode::Netkit)
        | (TcHook::FromPod | TcHook::NodeEgress, AttachMode::None | AttachMode::Clsact) => None,
    }
}

impl AttachPoint {
    /// Returns the TCX hook at this point.
    pub const fn tcx_hook(self) -> MprogHook {
        match self.hook {
            TcHook::FromPod => MprogHook::TcxIngress,
            TcHook::NodeEgress => MprogHook::TcxEgress,
        }
    }
}

fn required_hook(point: AttachPoint, mode: AttachMode) -> Result<MprogHook, DatapathError> {
    let unsupported = || failed("attach a", point, mode)(io::ErrorKind::Unsupported.into());
    mprog_hook(point.hook, mode).ok_or_else(unsupported)
}

fn failed(
    operation: &'static str,
    point: AttachPoint,
    mode: AttachMode,
) -> impl FnOnce(io::Error) -> DatapathError {
    move |source| DatapathError::Link { operation, mode: mode.name(), ifindex: point.ifindex, source }
}
