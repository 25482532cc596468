//! What is in the kernel: loads, pins, attaches, replaces and removes it.

pub mod bpf;
pub mod cgroup_link;
pub mod cgroup_order;
mod cgroups;
pub mod claim;
pub mod clsact;
pub mod config;
pub mod counters;
pub mod denials;
pub mod endpoints;
pub mod exemptions;
mod force;
pub mod home;
pub mod hosts;
pub mod object;
pub mod pins;
pub mod pods;
pub mod recent;
pub mod records;
mod repair_backoff;
pub mod sendmsg;
pub mod sockets;
mod tcx;

use std::{collections::BTreeMap, io, path::PathBuf};

use aya::maps::MapError;
use imds_ebpf_common::{
    Answer, AttachMode, Mode, Subject, SubjectKind, TcHook, TcHookSet,
    names::{MAP_EXEMPT, tc_program},
};
use thiserror::Error;

use self::{
    cgroups::Cgroups,
    claim::Claim,
    object::{Maps, ObjectError, Programs},
    pins::{AttachPoint, PinDir, PinError},
    records::LinkState,
    tcx::Links,
};
use crate::{
    config::{Hooks, Sendmsg},
    diagnostics::{Diagnostics, DiagnosticsError},
    endpoints::Guarded,
    exempt::Grants,
    node::{
        links::Link,
        netlink::{Netlink, NetlinkError},
        netns::Identity,
    },
    pods::{Lookup, Name},
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
    /// A call on the link of a cgroup.
    #[error("failed to {operation} {}", path.display())]
    Cgroup {
        /// The call.
        operation: &'static str,
        /// The cgroup, or the pin of the link.
        path: PathBuf,
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
            Self::Object(_)
            | Self::Pin(_)
            | Self::Cgroup { .. }
            | Self::Elsewhere { .. }
            | Self::Map { .. } => None,
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
    cgroups: Cgroups,
    told: pods::Told,
    granted: exemptions::Known,
    netlink: Netlink,
    backend: AttachMode,
    hooks: Hooks,
}

/// What a datapath is to be.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What happens to a packet from a pod to a guarded endpoint.
    pub mode: Mode,
    /// What its sender is told where it is denied.
    pub answer: Answer,
    /// Where packets and calls are judged.
    pub hooks: Hooks,
    /// The cgroup of the `local_service` hook, if that hook is on.
    pub local_service: Option<PathBuf>,
    /// Setting of the sendmsg programs of the `socket` hook.
    pub sendmsg: Sendmsg,
    /// How interfaces are attached.
    pub backend: AttachMode,
    /// The cgroup below which sockets are guarded, where they are.
    pub cgroup: Option<PathBuf>,
    /// How the programs know the node.
    pub identity: Identity,
    /// The bit of a packet's mark by which `from_pod` tells `node_egress` that it is exempt.
    pub mark: u32,
}

impl Datapath {
    /// Loads the programs on the pinned maps, or on new ones where none are pinned or this version would misread them,
    /// and takes over the pinned links. What was attached goes on with the earlier programs until
    /// [`Datapath::apply`] replaces them.
    ///
    /// Where this fails, nothing that was not there before stays behind.
    pub fn open(
        claim: Claim,
        plan: &Plan,
        guarded: &Guarded,
        netlink: Netlink,
    ) -> Result<Self, DatapathError> {
        let Plan { backend, hooks, .. } = *plan;
        match Self::load(claim.dir(), plan, guarded) {
            Ok((programs, maps, links, cgroups)) => {
                let datapath = Self {
                    claim,
                    programs,
                    maps,
                    links,
                    cgroups,
                    told: pods::Told::default(),
                    granted: exemptions::Known::default(),
                    netlink,
                    backend,
                    hooks,
                };
                Ok(datapath)
            }
            Err(error) => {
                if claim.is_new() {
                    claim.remove()?;
                }
                Err(error)
            }
        }
    }

    fn load(
        pins: &PinDir,
        plan: &Plan,
        guarded: &Guarded,
    ) -> Result<(Programs, Maps, Links, Cgroups), DatapathError> {
        home::ensure_free(pins)?;
        for reason in object::drop_foreign_maps(pins)? {
            log::warn!("starting with new maps and counters: {reason}");
        }
        let programs = Programs::load(pins, plan.hooks, &endpoints::filter_while_loading(pins, guarded))?;
        let mut maps = Maps::open(pins)?;
        force::write(&mut maps, plan, guarded)?;
        programs.pin(pins)?;
        let links = Links::adopt(pins)?;
        let cgroups = Cgroups::adopt(pins, plan)?;
        Ok((programs, maps, links, cgroups))
    }

    /// The pin directory.
    #[must_use]
    pub fn pins(&self) -> &PinDir {
        self.claim.dir()
    }

    /// What the programs log of themselves.
    pub fn diagnostics(&self) -> Result<Diagnostics, DiagnosticsError> {
        Diagnostics::open(self.programs.ids().next().unwrap_or_default())
    }

    /// Attach mode that a hook of an interface with these `hooks` should have.
    #[must_use]
    pub fn desired_mode(&self, _link: &Link, hooks: TcHookSet, hook: TcHook) -> AttachMode {
        let is_desired = self.hooks.has(hook.hook()) && hooks.has(hook);
        if is_desired { self.backend } else { AttachMode::None }
    }

    /// Indices of interfaces of which something is pinned or recorded.
    #[must_use]
    pub fn known(&self) -> Vec<u32> {
        let mut known: Vec<u32> = self.links.indices().chain(self.maps.interfaces.keys().flatten()).collect();
        known.sort_unstable();
        known.dedup();
        known
    }

    /// What of ours is on an edge of an interface.
    ///
    /// Filters are looked for where they are this agent's way or an agent recorded one, and everywhere where the caller
    /// wants to be `thorough`.
    pub async fn observe(
        &mut self,
        link: &Link,
        edge: TcHook,
        thorough: bool,
    ) -> Result<Vec<Attachment>, DatapathError> {
        let spot = AttachPoint { ifindex: link.index, edge };
        // Where the hook is off there is no program, so that none that is there is the current one.
        let program = self.programs.id(tc_program(edge, link.frame)).unwrap_or_default();
        let mut attachments = Vec::new();
        attachments.extend(self.links.observe(self.claim.dir(), spot, program)?);
        let recorded = records::has_filter(&self.maps, link.index);
        if thorough || recorded || self.backend == AttachMode::Clsact {
            attachments.extend(clsact::attachment(&self.netlink, spot, program).await?);
        }
        Ok(attachments)
    }

    /// Whether TCX programs of others see what a pod sends before any filter does.
    pub fn has_company(link: &Link) -> Result<bool, DatapathError> {
        let spot = AttachPoint { ifindex: link.index, edge: TcHook::FromPod };
        Ok(!tcx::programs(spot)?.is_empty())
    }

    /// Carries out one action on an edge of an interface.
    pub async fn apply(&mut self, link: &Link, edge: TcHook, action: Action) -> Result<(), DatapathError> {
        let spot = AttachPoint { ifindex: link.index, edge };
        let name = tc_program(edge, link.frame);
        match action {
            Action::Attach(AttachMode::Tcx) => {
                counters::prepare(&mut self.maps, link.index, edge.hook());
                self.links.attach(self.claim.dir(), spot, self.programs.fd(name)?)
            }
            Action::Replace(AttachMode::Tcx) => self.links.replace(spot, self.programs.fd(name)?),
            Action::Pin(AttachMode::Tcx) => self.links.pin(self.claim.dir(), spot),
            Action::Reorder(AttachMode::Tcx) => {
                // The kernel takes a program only once per hook, so that a second copy has to hold the place before
                // this one can have it.
                let hooks = Hooks::from_bits(edge.hook().bit());
                let copy = Programs::load(self.claim.dir(), hooks, &endpoints::filter(&self.maps)?)?;
                self.links.raise(self.claim.dir(), spot, copy.fd(name)?)?;
                self.links.replace(spot, self.programs.fd(name)?)
            }
            Action::Detach(AttachMode::Tcx) => self.links.detach(self.claim.dir(), spot),
            Action::Attach(AttachMode::Clsact) => {
                counters::prepare(&mut self.maps, link.index, edge.hook());
                if clsact::ensure_qdisc(&self.netlink, link.index).await?
                    && let Err(error) = records::set_owns_qdisc(&mut self.maps, link, edge)
                {
                    log::warn!("{}: `unload` will leave its clsact qdisc: {error}", link.name);
                }
                Ok(clsact::attach_first(&self.netlink, spot, self.programs.fd(name)?, name).await?)
            }
            Action::Reorder(AttachMode::Clsact) => {
                Ok(clsact::attach_first(&self.netlink, spot, self.programs.fd(name)?, name).await?)
            }
            Action::Replace(AttachMode::Clsact) => {
                Ok(clsact::replace(&self.netlink, spot, self.programs.fd(name)?, name).await?)
            }
            Action::Detach(AttachMode::Clsact) => {
                remove_filter(&self.netlink, &mut self.maps, spot).await.map(drop)
            }
            // Filters are not pinned, and nothing is attached by no means.
            Action::Pin(AttachMode::Clsact | AttachMode::None | AttachMode::Netkit)
            | Action::Attach(AttachMode::None | AttachMode::Netkit)
            | Action::Replace(AttachMode::None | AttachMode::Netkit)
            | Action::Reorder(AttachMode::None | AttachMode::Netkit)
            | Action::Detach(AttachMode::None | AttachMode::Netkit) => Ok(()),
        }
    }

    /// Records the state of an interface, for `status` and for the next agent.
    pub fn record(&mut self, link: &Link, state: &LinkState) -> Result<(), DatapathError> {
        records::put(&mut self.maps, link, state)
    }

    /// Forgets what an interface's index stood for before it was this one's.
    pub fn take_over(&mut self, link: &Link) -> Result<(), DatapathError> {
        let owns_qdisc = records::get(&self.maps, link.index)
            .is_some_and(|record| record.owns_qdisc == 1 && record.name == records::padded(&link.name));
        self.forget(link.index)?;
        // By the same name it is most likely the same interface, whose filter somebody removed: a qdisc that is there
        // then is still the agent's.
        if owns_qdisc { records::set_owns_qdisc(&mut self.maps, link, TcHook::FromPod) } else { Ok(()) }
    }

    /// Forgets an interface that is gone, and keeps its counts in the sum of those that are.
    pub fn forget(&mut self, ifindex: u32) -> Result<(), DatapathError> {
        // Before all else: the next interface may have its index.
        self.revoke(ifindex)?;
        for edge in TcHook::ALL {
            self.links.forget(self.claim.dir(), AttachPoint { ifindex, edge })?;
        }
        counters::fold(&mut self.maps, ifindex)?;
        records::remove(&mut self.maps, ifindex);
        Ok(())
    }

    /// Makes these all the grants that there are. Returns how often a map was written.
    pub fn grant(&mut self, wanted: &Grants) -> Result<usize, DatapathError> {
        exemptions::write(&mut self.maps, &mut self.granted, wanted)
    }

    /// Reads, with the next [`Datapath::grant`], what somebody else may have made of what is granted.
    pub fn forget_granted(&mut self) {
        self.granted.forget();
    }

    /// Takes from an interface what is granted to it.
    pub fn revoke(&mut self, ifindex: u32) -> Result<(), DatapathError> {
        let subject = Subject::new(SubjectKind::Interface, ifindex.into());
        exemptions::revoke(&mut self.maps, &mut self.granted, subject)
    }

    /// Makes these all the names that are told. Returns how often a map was written.
    pub fn tell_names(&mut self, names: &BTreeMap<Subject, Name<'_>>) -> Result<usize, DatapathError> {
        pods::write(&mut self.maps, &mut self.told, names)
    }

    /// Records how pods are looked up; `None` where they are not.
    pub fn record_lookup(&mut self, lookup: Option<&Lookup>) -> Result<(), DatapathError> {
        pods::put(&mut self.maps, lookup)
    }

    /// What is granted.
    pub fn granted(&self) -> Result<Grants, DatapathError> {
        exemptions::read(&self.maps).map_err(|source| DatapathError::Map { map: MAP_EXEMPT, source })
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

/// Removes our filters from a hook, and the qdisc where an agent made it and nobody uses it. Returns whether there was
/// a filter.
async fn remove_filter(netlink: &Netlink, maps: &mut Maps, spot: AttachPoint) -> Result<bool, DatapathError> {
    let detached = clsact::detach_all(netlink, spot).await?;
    if records::get(maps, spot.ifindex).is_some_and(|record| record.owns_qdisc == 1) {
        clsact::remove_unused_qdisc(netlink, spot.ifindex).await?;
    }
    Ok(detached)
}

/// What [`unload`] found to remove.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Removed {
    /// Interfaces that were guarded until now.
    pub interfaces: usize,
    /// Whether sockets were.
    pub sockets: bool,
    /// The pin directory, where there was one.
    pub pin_dir: Option<PathBuf>,
}

/// Removes everything of ours: links, filters, qdiscs that an agent made, pins, and with them programs and maps.
///
/// Detaching a TCX link takes the kernel a while, as attaching does: `progress` is told how many of how many are done.
pub async fn unload(
    pins: &PinDir,
    netlink: &Netlink,
    links: &[Link],
    mut progress: impl FnMut(usize, usize),
) -> Result<Removed, DatapathError> {
    let mut removed = Removed::default();
    let Some(claim) = pins.claim_existing()? else {
        return Ok(removed);
    };
    home::ensure_no_filters_elsewhere(pins)?;
    removed.sockets = sockets::detach_all(pins)? | hosts::detach_all(pins)?;
    removed.sockets |= sockets::detach_local_service(pins)?;
    let pinned = pins.pinned_links()?;
    for (done, (_, path)) in (1..).zip(&pinned) {
        removed.interfaces += usize::from(tcx::detach_pinned(path)?);
        progress(done, pinned.len());
    }
    // Maps that can't be read leave it unknown which qdiscs are ours; those stay.
    let mut maps = Maps::open(pins).ok();
    for link in links {
        let mut detached = false;
        for edge in TcHook::ALL {
            let spot = AttachPoint { ifindex: link.index, edge };
            detached |= match &mut maps {
                Some(maps) => remove_filter(netlink, maps, spot).await?,
                None => clsact::detach_all(netlink, spot).await?,
            };
        }
        removed.interfaces += usize::from(detached);
    }
    removed.pin_dir = Some(pins.root().to_owned());
    claim.remove()?;
    Ok(removed)
}
