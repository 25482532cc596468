//! What is in the kernel: loads, pins, attaches, replaces and removes it.

pub mod bpf;
pub mod clsact;
pub mod counters;
pub mod endpoints;
pub mod home;
pub mod object;
pub mod pins;
pub mod records;
mod tcx;

use std::{io, path::PathBuf};

use aya::maps::MapError;
use imds_ebpf_common::{Backend, Mode, Policy, Role, maps::LAYOUT};
use thiserror::Error;

use self::{
    object::{Maps, ObjectError, Programs},
    pins::{Claim, PinDir, PinError},
    tcx::Links,
};
use crate::{
    endpoints::Guarded,
    node::{
        links::Link,
        netlink::{Netlink, NetlinkError},
    },
    reconcile::{Action, Attachment},
};

/// What failed in the kernel, and on what.
#[derive(Debug, Error)]
pub enum DatapathError {
    /// The object, its programs or its maps.
    #[error(transparent)]
    Object(#[from] ObjectError),
    /// The pin directory.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// A request to rtnetlink.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// A call on a TCX link.
    #[error("{operation} on interface {ifindex}")]
    Link {
        /// The call.
        operation: &'static str,
        /// The interface.
        ifindex: u32,
        /// What the kernel said.
        source: io::Error,
    },
    /// The pins belong to another network namespace.
    #[error("{} belongs to network namespace {netns}, not to this one: use another --pin-dir here, or run this there with `nsenter --net=`", path.display())]
    Elsewhere {
        /// The pin directory.
        path: PathBuf,
        /// Inode number of the namespace, as in `lsns -t net`.
        netns: u32,
    },
    /// A map that can't be written.
    #[error("can't write the map {map}")]
    Map {
        /// The map.
        map: &'static str,
        /// What the kernel said.
        source: MapError,
    },
}

impl DatapathError {
    /// Whether the interface went away meanwhile, which is no failure.
    #[must_use]
    pub fn is_interface_gone(&self) -> bool {
        let errno = match self {
            Self::Netlink(error) => error.errno(),
            Self::Link { source, .. } => source.raw_os_error(),
            Self::Object(_) | Self::Pin(_) | Self::Elsewhere { .. } | Self::Map { .. } => None,
        };
        errno == Some(libc::ENODEV)
    }
}

/// The programs, maps and links of one pin directory, held by this process.
pub struct Datapath {
    claim: Claim,
    programs: Programs,
    maps: Maps,
    links: Links,
    netlink: Netlink,
    backend: Backend,
}

impl Datapath {
    /// Loads the programs on the pinned maps, or on new ones where none are pinned or this version would misread them,
    /// and takes over the pinned links. What was attached goes on with the earlier programs until
    /// [`Datapath::apply`] replaces them.
    ///
    /// Where this fails, nothing that was not there before stays behind.
    pub fn open(
        claim: Claim,
        mode: Mode,
        guarded: &Guarded,
        backend: Backend,
        netlink: Netlink,
    ) -> Result<Self, DatapathError> {
        match Self::load(claim.dir(), mode, guarded) {
            Ok((programs, maps, links)) => Ok(Self { claim, programs, maps, links, netlink, backend }),
            Err(error) => {
                if claim.is_new() {
                    claim.remove()?;
                }
                Err(error)
            }
        }
    }

    fn load(pins: &PinDir, mode: Mode, guarded: &Guarded) -> Result<(Programs, Maps, Links), DatapathError> {
        home::ensure_free(pins)?;
        for reason in object::drop_foreign_maps(pins)? {
            log::warn!("starting with new maps and counters: {reason}");
        }
        let programs = Programs::load(pins, &endpoints::filter_while_loading(pins, guarded))?;
        let mut maps = Maps::open(pins)?;
        let policy = Policy { mode: mode as u32, layout: LAYOUT, netns: home::this_netns()? };
        maps.policy
            .set(0, policy, 0)
            .map_err(|source| DatapathError::Map { map: imds_ebpf_common::names::MAP_POLICY, source })?;
        endpoints::write(&mut maps, guarded)?;
        programs.pin(pins)?;
        let links = Links::adopt(pins)?;
        Ok((programs, maps, links))
    }

    /// The pin directory.
    #[must_use]
    pub fn pins(&self) -> &PinDir {
        self.claim.dir()
    }

    /// How interfaces are attached.
    #[must_use]
    pub fn backend(&self) -> Backend {
        self.backend
    }

    /// Indices of interfaces of which something is pinned or recorded.
    #[must_use]
    pub fn known(&self) -> Vec<u32> {
        let mut known: Vec<u32> = self.links.indices().chain(self.maps.interfaces.keys().flatten()).collect();
        known.sort_unstable();
        known.dedup();
        known
    }

    /// What of ours is on an interface.
    ///
    /// Filters are looked for where they are this agent's way or an agent recorded one, and everywhere where the caller
    /// wants to be `thorough`.
    pub async fn observe(&mut self, link: &Link, thorough: bool) -> Result<Vec<Attachment>, DatapathError> {
        let program = self.programs.id(link.frame);
        let mut attachments = Vec::new();
        attachments.extend(self.links.observe(self.claim.dir(), link.index, program)?);
        let recorded = records::get(&self.maps, link.index)
            .is_some_and(|record| record.backend == Backend::Clsact as u8);
        if thorough || recorded || self.backend == Backend::Clsact {
            attachments.extend(clsact::attachment(&self.netlink, link.index, program).await?);
        }
        Ok(attachments)
    }

    /// Carries out one action on an interface.
    pub async fn apply(&mut self, link: &Link, action: Action) -> Result<(), DatapathError> {
        match action {
            Action::Attach(Backend::Tcx) => {
                counters::prepare(&mut self.maps, link.index);
                self.links.attach(self.claim.dir(), link.index, self.programs.fd(link.frame)?)
            }
            Action::Replace(Backend::Tcx) => self.links.replace(link.index, self.programs.fd(link.frame)?),
            Action::Pin(Backend::Tcx) => self.links.pin(self.claim.dir(), link.index),
            Action::Raise(Backend::Tcx) => {
                // The kernel takes a program only once per hook, so that a second copy has to hold the place before
                // this one can have it.
                let copy = Programs::load(self.claim.dir(), &endpoints::filter(&self.maps)?)?;
                self.links.raise(self.claim.dir(), link.index, copy.fd(link.frame)?)?;
                self.links.replace(link.index, self.programs.fd(link.frame)?)
            }
            Action::Detach(Backend::Tcx) => self.links.detach(self.claim.dir(), link.index),
            Action::Attach(Backend::Clsact) => self.attach_filter(link).await,
            Action::Raise(Backend::Clsact) => {
                let program = self.programs.fd(link.frame)?;
                Ok(clsact::attach_first(&self.netlink, link.index, program, object::name(link.frame)).await?)
            }
            Action::Replace(Backend::Clsact) => {
                let program = self.programs.fd(link.frame)?;
                Ok(clsact::replace(&self.netlink, link.index, program, object::name(link.frame)).await?)
            }
            Action::Detach(Backend::Clsact) => remove_filter(&self.netlink, &mut self.maps, link.index).await,
            // Filters are not pinned, and nothing is attached by no means.
            Action::Pin(Backend::Clsact | Backend::None)
            | Action::Attach(Backend::None)
            | Action::Replace(Backend::None)
            | Action::Raise(Backend::None)
            | Action::Detach(Backend::None) => Ok(()),
        }
    }

    async fn attach_filter(&mut self, link: &Link) -> Result<(), DatapathError> {
        counters::prepare(&mut self.maps, link.index);
        let made = clsact::ensure_qdisc(&self.netlink, link.index).await?;
        if made {
            records::mark_qdisc(&mut self.maps, link)?;
        }
        let program = self.programs.fd(link.frame)?;
        Ok(clsact::attach_first(&self.netlink, link.index, program, object::name(link.frame)).await?)
    }

    /// Records what an interface is and how it is guarded, for `status` and for the next agent.
    pub fn record(&mut self, link: &Link, role: Role, backend: Backend) -> Result<(), DatapathError> {
        records::put(&mut self.maps, link, role, backend)
    }

    /// Forgets what an interface's index stood for before it was this one's.
    pub fn take_over(&mut self, link: &Link) -> Result<(), DatapathError> {
        let made_qdisc = records::get(&self.maps, link.index)
            .is_some_and(|record| record.made_qdisc == 1 && record.name == records::padded(&link.name));
        self.forget(link.index)?;
        // By the same name it is most likely the same interface, whose filter somebody removed: a qdisc that is there
        // then is still the agent's.
        if made_qdisc { records::mark_qdisc(&mut self.maps, link) } else { Ok(()) }
    }

    /// Forgets an interface that is gone, and keeps its counts in the sum of those that are.
    pub fn forget(&mut self, ifindex: u32) -> Result<(), DatapathError> {
        self.links.forget(self.claim.dir(), ifindex)?;
        counters::fold(&mut self.maps, ifindex)?;
        records::remove(&mut self.maps, ifindex);
        Ok(())
    }

    /// Lets `status` know that every interface was looked at.
    pub fn announce_ready(&mut self) -> Result<(), DatapathError> {
        Ok(self.claim.announce_ready()?)
    }

    /// Makes the pin directory whole again, where somebody removed some of it. Returns whether that was so.
    pub fn restore_pins(&mut self) -> Result<bool, DatapathError> {
        let mut missing = self.claim.restore()?;
        let pins = self.claim.dir();
        if self.programs.is_unpinned(pins) {
            self.programs.pin(pins)?;
            missing = true;
        }
        missing |= self.maps.restore_pins(pins)?;
        Ok(missing)
    }
}

async fn remove_filter(netlink: &Netlink, maps: &mut Maps, ifindex: u32) -> Result<(), DatapathError> {
    clsact::detach_all(netlink, ifindex).await?;
    if records::get(maps, ifindex).is_some_and(|record| record.made_qdisc == 1) {
        clsact::remove_unused_qdisc(netlink, ifindex).await?;
    }
    Ok(())
}

/// What [`unload`] found to remove.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Removed {
    /// Interfaces that were guarded until now.
    pub interfaces: usize,
    /// The pin directory, where there was one.
    pub pin_dir: Option<PathBuf>,
}

/// Removes everything of ours: links, filters, qdiscs that an agent made, pins, and with them programs and maps.
pub async fn unload(pins: &PinDir, netlink: &Netlink, links: &[Link]) -> Result<Removed, DatapathError> {
    let mut removed = Removed::default();
    let Some(claim) = pins.claim_existing()? else {
        return Ok(removed);
    };
    home::ensure_no_filters_elsewhere(pins)?;
    for (_, path) in pins.pinned_links()? {
        removed.interfaces += usize::from(tcx::detach_pinned(&path)?);
    }
    // Maps that can't be read leave it unknown which qdiscs are ours; those stay.
    let mut maps = Maps::open(pins).ok();
    for link in links {
        let detached = clsact::detach_all(netlink, link.index).await?;
        removed.interfaces += usize::from(detached);
        if let Some(maps) = &mut maps {
            remove_filter(netlink, maps, link.index).await?;
        }
    }
    removed.pin_dir = Some(pins.root().to_owned());
    claim.remove()?;
    Ok(removed)
}
