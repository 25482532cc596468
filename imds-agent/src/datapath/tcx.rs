//! TCX links, held and pinned.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use imds_ebpf_common::Backend;

use super::{
    DatapathError, bpf,
    pins::{self, PinDir, PinError},
};
use crate::reconcile::{Attachment, Place};

/// The links of this process by interface index. Each is pinned, and held too, so that a pin that somebody removes
/// takes nothing with it.
#[derive(Debug, Default)]
pub(super) struct Links {
    links: BTreeMap<u32, Held>,
}

#[derive(Debug)]
struct Held {
    fd: OwnedFd,
    id: u32,
}

impl Links {
    /// Takes over what earlier agents pinned. What is no link any more, or none of ours, is unpinned.
    pub(super) fn adopt(pins: &PinDir) -> Result<Self, PinError> {
        let mut links = BTreeMap::new();
        for (ifindex, path) in pins.pinned_links()? {
            let Some(fd) = pins::open(&path)? else { continue };
            match bpf::tcx_link(&fd) {
                Ok(Some(link)) if link.ifindex == ifindex => {
                    links.insert(ifindex, Held { fd, id: link.id });
                }
                // Detached: its interface is gone.
                Ok(Some(link)) if link.ifindex == 0 => pins::unpin(&path)?,
                Ok(_) | Err(_) => {
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
        self.links.keys().copied()
    }

    /// What the kernel says of the interface's link. One that was detached is forgotten.
    pub(super) fn observe(
        &mut self,
        pins: &PinDir,
        ifindex: u32,
        program: u32,
    ) -> Result<Option<Attachment>, DatapathError> {
        let Some(held) = self.links.get(&ifindex) else { return Ok(None) };
        let entries = bpf::tcx_entries(ifindex).map_err(failed("listing programs", ifindex))?;
        let Some(position) = entries.iter().position(|entry| entry.link == held.id) else {
            self.forget(pins, ifindex)?;
            return Ok(None);
        };
        Ok(Some(Attachment {
            backend: Backend::Tcx,
            current: entries[position].program == program,
            pinned: is_pinned(held.id, &pins.link(ifindex)),
            place: if position == 0 { Place::First } else { Place::Behind },
        }))
    }

    pub(super) fn attach(
        &mut self,
        pins: &PinDir,
        ifindex: u32,
        program: BorrowedFd<'_>,
    ) -> Result<(), DatapathError> {
        let fd = bpf::link_create_first(program, ifindex).map_err(failed("attaching a TCX link", ifindex))?;
        self.hold(pins, ifindex, fd)
    }

    pub(super) fn replace(&mut self, ifindex: u32, program: BorrowedFd<'_>) -> Result<(), DatapathError> {
        let held = self.held(ifindex)?;
        bpf::link_update(&held.fd, program).map_err(failed("replacing a TCX link's program", ifindex))
    }

    pub(super) fn pin(&mut self, pins: &PinDir, ifindex: u32) -> Result<(), DatapathError> {
        let held = self.held(ifindex)?;
        Ok(pins::pin_over(&held.fd, &pins.link(ifindex))?)
    }

    /// Attaches `copy` before all others and lets the link there go.
    pub(super) fn raise(
        &mut self,
        pins: &PinDir,
        ifindex: u32,
        copy: BorrowedFd<'_>,
    ) -> Result<(), DatapathError> {
        let fd = bpf::link_create_first(copy, ifindex).map_err(failed("attaching a TCX link", ifindex))?;
        let before = self.links.remove(&ifindex);
        self.hold(pins, ifindex, fd)?;
        match before {
            Some(held) => bpf::link_detach(&held.fd).map_err(failed("detaching a TCX link", ifindex)),
            None => Ok(()),
        }
    }

    pub(super) fn detach(&mut self, pins: &PinDir, ifindex: u32) -> Result<(), DatapathError> {
        let held = self.held(ifindex)?;
        bpf::link_detach(&held.fd).map_err(failed("detaching a TCX link", ifindex))?;
        Ok(self.forget(pins, ifindex)?)
    }

    /// Lets go of a link that is detached, or whose interface is gone.
    pub(super) fn forget(&mut self, pins: &PinDir, ifindex: u32) -> Result<(), PinError> {
        self.links.remove(&ifindex);
        pins::unpin(&pins.link(ifindex))
    }

    fn hold(&mut self, pins: &PinDir, ifindex: u32, fd: OwnedFd) -> Result<(), DatapathError> {
        let link = bpf::tcx_link(&fd).map_err(failed("describing a TCX link", ifindex))?;
        let id = link.map_or(0, |link| link.id);
        // Held before it is pinned: where that fails the interface is guarded all the same while this process lives.
        let held = self.links.entry(ifindex).insert_entry(Held { fd, id });
        Ok(pins::pin_over(&held.get().fd, &pins.link(ifindex))?)
    }

    fn held(&self, ifindex: u32) -> Result<&Held, DatapathError> {
        let missing = || failed("finding the TCX link", ifindex)(io::ErrorKind::NotFound.into());
        self.links.get(&ifindex).ok_or_else(missing)
    }
}

/// Detaches the link that is pinned at `path`, at once, and unpins it. Returns whether it was attached.
pub(super) fn detach_pinned(path: &Path) -> Result<bool, DatapathError> {
    let mut was_attached = false;
    if let Some(fd) = pins::open(path)?
        && let Ok(Some(link)) = bpf::tcx_link(fd.as_fd())
        && link.ifindex != 0
    {
        bpf::link_detach(&fd).map_err(failed("detaching a TCX link", link.ifindex))?;
        was_attached = true;
    }
    pins::unpin(path)?;
    Ok(was_attached)
}

fn is_pinned(id: u32, path: &Path) -> bool {
    pins::open(path)
        .ok()
        .flatten()
        .is_some_and(|fd| bpf::tcx_link(fd).is_ok_and(|link| link.is_some_and(|link| link.id == id)))
}

fn failed(operation: &'static str, ifindex: u32) -> impl FnOnce(io::Error) -> DatapathError {
    move |source| DatapathError::Link { operation, ifindex, source }
}
