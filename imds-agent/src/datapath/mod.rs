//! The kernel side of the agent: loads, pins, attaches, replaces and removes programs, maps and links.

mod attach;
pub mod bpf;
pub mod cgroup_link;
pub mod cgroup_order;
pub mod cgroups;
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
mod loader;
pub mod mprog;
pub mod object;
pub mod obstacles;
pub mod other_agents;
mod pin_owner;
mod pin_removal;
pub mod pins;
pub mod pods;
pub mod qdisc;
mod rcu;
pub mod recent;
pub mod records;
mod repair_backoff;
pub mod sendmsg;
pub mod sockets;
mod unload;
mod unload_request;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::PathBuf,
};

use aya::maps::MapError;
use imds_ebpf_common::{
    AttachMode, DenyAction, DenyErrno, Mode, Subject, SubjectKind, TcHook, TcHookSet, names::MAP_EXEMPT,
};
use thiserror::Error;

pub use self::unload::{Progress, Removed, unload};
use self::{
    cgroups::Cgroups,
    claim::Claim,
    mprog::Links,
    object::{Maps, ObjectError, Programs},
    obstacles::ObstacleError,
    pins::{AttachPoint, PinDir, PinError},
    records::LinkState,
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
};

/// Failure of a kernel operation.
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
    /// A call on a TCX or netkit link.
    #[error("failed to {operation} {mode} link of interface {ifindex}")]
    Link {
        /// The call.
        operation: &'static str,
        /// Name of the attach mode.
        mode: &'static str,
        /// The interface.
        ifindex: u32,
        /// What the kernel said.
        source: io::Error,
    },
    /// An obstacle that no retry removes.
    #[error(transparent)]
    Obstacle(#[from] ObstacleError),
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
    /// Reports whether the interface was deleted concurrently, which is not a failure.
    #[must_use]
    pub fn is_interface_gone(&self) -> bool {
        self.errno() == Some(libc::ENODEV)
    }

    /// Returns the kernel's error number of a call on an interface.
    fn errno(&self) -> Option<i32> {
        match self {
            Self::Netlink(error) => error.errno(),
            Self::Link { source, .. } => source.raw_os_error(),
            Self::Object(_)
            | Self::Pin(_)
            | Self::Obstacle(_)
            | Self::Cgroup { .. }
            | Self::Elsewhere { .. }
            | Self::Map { .. } => None,
        }
    }

    /// Returns the obstacle, if the error is one: retries fail until the operator or another program removes it.
    #[must_use]
    pub fn obstacle(&self) -> Option<&ObstacleError> {
        match self {
            Self::Obstacle(error) => Some(error),
            _ => None,
        }
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
    /// Interfaces on which the kernel refused a netkit link.
    refused_netkit: BTreeSet<u32>,
    hooks: Hooks,
}

/// Desired state of the datapath.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Mode.
    pub mode: Mode,
    /// Reply that the sender of a denied packet gets.
    pub on_deny: DenyAction,
    /// Error of a denied call, if the kernel lets programs choose it.
    pub on_deny_errno: DenyErrno,
    /// Hooks that are on.
    pub hooks: Hooks,
    /// The cgroup of the `local_service` hook, if that hook is on.
    pub local_service: Option<PathBuf>,
    /// Setting of the sendmsg programs of the `socket` hook.
    pub sendmsg: Sendmsg,
    /// Attach mode of interfaces.
    pub backend: AttachMode,
    /// Cgroup of the `socket` hook, if that hook is on.
    pub cgroup: Option<PathBuf>,
    /// Network namespace of the node, as the programs identify it.
    pub identity: Identity,
    /// Bit of the packet mark that `from_pod` sets for `node_egress` on packets of exempt pods behind a bridge.
    pub mark: u32,
}

impl Datapath {
    /// Opens the pinned maps, or creates new ones if none are pinned or their layout differs, loads the programs, and adopts
    /// pinned links. Attached programs of an earlier agent run until [`Datapath::apply`] replaces them.
    ///
    /// If this fails, it leaves nothing behind that was not there before.
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
                    refused_netkit: BTreeSet::new(),
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

    /// Opens the log of the programs.
    pub fn diagnostics(&self) -> Result<Diagnostics, DiagnosticsError> {
        Diagnostics::open(self.programs.ids().next().unwrap_or_default())
    }

    /// Attach mode that a hook of an interface with these `hooks` should have.
    #[must_use]
    pub fn desired_mode(&self, link: &Link, hooks: TcHookSet, hook: TcHook) -> AttachMode {
        let is_desired = self.hooks.has(hook.hook()) && hooks.has(hook);
        if is_desired { self.attach_mode(link, hook) } else { AttachMode::None }
    }

    /// Returns the indices of interfaces with a pinned link or a record.
    #[must_use]
    pub fn known(&self) -> Vec<u32> {
        let mut known: Vec<u32> = self.links.indices().chain(self.maps.interfaces.keys().flatten()).collect();
        known.sort_unstable();
        known.dedup();
        known
    }

    /// Records the state of an interface, for `status` and for the next agent.
    pub fn record(&mut self, link: &Link, state: LinkState) -> Result<(), DatapathError> {
        records::put(&mut self.maps, link, state)
    }

    /// Updates the record of an interface after its veth peer was reconciled.
    pub fn update_own_packets(&mut self, link: &Link) -> Result<(), DatapathError> {
        records::update_own_packets(&mut self.maps, link)
    }

    /// Reports whether the agent has recorded its program at this hook of the interface.
    #[must_use]
    pub fn was_attached(&self, link: &Link, hook: TcHook) -> bool {
        records::get(&self.maps, link.index).is_some_and(|record| record.is_attached(hook))
    }

    /// Reports whether an agent has recorded that an attachment to this interface waited in its attach queue.
    #[must_use]
    pub fn was_pending(&self, link: &Link) -> bool {
        records::get(&self.maps, link.index)
            .is_some_and(|record| record.pending == 1 && record.name == records::padded(&link.name))
    }

    /// Removes the state of a deleted interface that had this index.
    pub fn take_over(&mut self, link: &Link) -> Result<(), DatapathError> {
        let owns_qdisc = records::get(&self.maps, link.index)
            .is_some_and(|record| record.owns_qdisc == 1 && record.name == records::padded(&link.name));
        self.forget(link.index)?;
        // Same name: most likely the same interface, and another program removed the filter. The qdisc that is there is still
        // the agent's.
        if owns_qdisc { records::set_owns_qdisc(&mut self.maps, link, TcHook::FromPod) } else { Ok(()) }
    }

    /// Removes all state of a deleted interface. Its counters are added to those of deleted interfaces.
    pub fn forget(&mut self, ifindex: u32) -> Result<(), DatapathError> {
        // Before all else: the next interface may have its index.
        self.revoke(ifindex)?;
        self.refused_netkit.remove(&ifindex);
        for edge in TcHook::ALL {
            self.links.forget(self.claim.dir(), AttachPoint { ifindex, edge })?;
        }
        // Left by a `verify` that was killed.
        let _no_probe = self.maps.probes.remove(&Subject::new(SubjectKind::Interface, ifindex.into()));
        counters::fold(&mut self.maps, ifindex)?;
        records::remove(&mut self.maps, ifindex);
        Ok(())
    }

    /// Replaces all exemptions. Returns the number of map updates.
    pub fn grant(&mut self, wanted: &Grants) -> Result<usize, DatapathError> {
        exemptions::write(&mut self.maps, &mut self.granted, wanted)
    }

    /// Drops the cached exemptions, so that the next [`Datapath::grant`] reads the map and corrects changes of other programs.
    pub fn forget_granted(&mut self) {
        self.granted.forget();
    }

    /// Removes the exemptions of an interface.
    pub fn revoke(&mut self, ifindex: u32) -> Result<(), DatapathError> {
        let subject = Subject::new(SubjectKind::Interface, ifindex.into());
        exemptions::revoke(&mut self.maps, &mut self.granted, subject)
    }

    /// Replaces the pod names in the map. Returns the number of map updates.
    pub fn tell_names(&mut self, names: &BTreeMap<Subject, Name<'_>>) -> Result<usize, DatapathError> {
        pods::write(&mut self.maps, &mut self.told, names)
    }

    /// Records the status of the pod watch; `None` if it is off.
    pub fn record_lookup(&mut self, lookup: Option<&Lookup>) -> Result<(), DatapathError> {
        pods::put(&mut self.maps, lookup)
    }

    /// Returns all exemptions of the map.
    pub fn granted(&self) -> Result<Grants, DatapathError> {
        exemptions::read(&self.maps).map_err(|source| DatapathError::Map { map: MAP_EXEMPT, source })
    }

    /// Marks the agent as ready: `status` then reports that every interface was reconciled.
    pub fn announce_ready(&mut self) -> Result<(), DatapathError> {
        Ok(self.claim.announce_ready()?)
    }

    /// Restores missing pins. Returns whether any was missing.
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
