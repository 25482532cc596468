//! Management of BPF objects: loads, pins, attaches, replaces and removes programs, maps and links.

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
    claim::PinLock,
    mprog::Links,
    object::{Maps, ObjectError, Programs},
    obstacles::ObstacleError,
    pins::{AttachPoint, PinDir, PinError},
    records::LinkState,
};
use crate::{
    bpf_log::{BpfLog, BpfLogError},
    config::{Hooks, Sendmsg},
    endpoints::EndpointSet,
    exempt::Grants,
    node::{
        links::Link,
        netlink::{Netlink, NetlinkError},
        netns::OwnNetns,
    },
    pods::{PodContainer, PodWatchStatus},
};

/// Failure of a kernel operation.
#[derive(Debug, Error)]
pub enum DatapathError {
    /// The BPF object, a program or a map failed.
    #[error(transparent)]
    Object(#[from] ObjectError),
    /// An operation on the pin directory failed.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// A request to rtnetlink failed.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// A call on a TCX or netkit link failed.
    #[error("failed to {operation} {mode} link of interface {ifindex}")]
    Link {
        /// Operation, for the message: a verb and an article.
        operation: &'static str,
        /// Name of the attach mode.
        mode: &'static str,
        /// Index of the interface.
        ifindex: u32,
        /// Error of the kernel.
        source: io::Error,
    },
    /// An obstacle that no retry removes.
    #[error(transparent)]
    Obstacle(#[from] ObstacleError),
    /// A call on the link of a cgroup failed.
    #[error("failed to {operation} {}", path.display())]
    Cgroup {
        /// Operation, for the message: a phrase that ends before the path.
        operation: &'static str,
        /// Path of the cgroup, or of the pinned link.
        path: PathBuf,
        /// Error of the kernel.
        source: io::Error,
    },
    /// The pins belong to another network namespace.
    #[error("{} belongs to another network namespace ({netns}); use another --pin-dir, or run this command in that namespace with `nsenter --net=`", path.display())]
    WrongNetns {
        /// Path of the pin directory.
        path: PathBuf,
        /// Inode number of the namespace, as in `lsns -t net`.
        netns: u32,
    },
    /// Reading or writing a map failed.
    #[error("failed to read or write map {map}")]
    Map {
        /// Name of the map.
        map: &'static str,
        /// Error of the kernel.
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
            | Self::WrongNetns { .. }
            | Self::Map { .. } => None,
        }
    }

    /// Returns the obstacle, if that is the error. Retries fail until the operator or another program removes it.
    #[must_use]
    pub fn obstacle(&self) -> Option<&ObstacleError> {
        match self {
            Self::Obstacle(error) => Some(error),
            _ => None,
        }
    }
}

/// Programs, maps and links of the pin directory that this process has locked.
pub struct Datapath {
    claim: PinLock,
    programs: Programs,
    maps: Maps,
    links: Links,
    cgroups: Cgroups,
    told: pods::Told,
    granted: exemptions::Known,
    netlink: Netlink,
    backend: AttachMode,
    /// Indices of interfaces on which the kernel rejected a netkit link.
    refused_netkit: BTreeSet<u32>,
    hooks: Hooks,
}

/// Desired state of the datapath.
#[derive(Clone, Debug)]
pub struct DatapathConfig {
    /// Mode of the policy.
    pub mode: Mode,
    /// Reply that the sender of a denied packet gets.
    pub on_deny: DenyAction,
    /// Error of a denied call, if the kernel lets programs choose it.
    pub on_deny_errno: DenyErrno,
    /// Hooks that the configuration enables.
    pub hooks: Hooks,
    /// Cgroup of the `local_service` hook, if that hook is on.
    pub local_service: Option<PathBuf>,
    /// Setting of the sendmsg programs of the `socket` hook.
    pub sendmsg: Sendmsg,
    /// Attach mode of interfaces, except netkit devices.
    pub backend: AttachMode,
    /// Cgroup of the `socket` hook, if that hook is on.
    pub cgroup: Option<PathBuf>,
    /// Network namespace of the node, as the programs identify it.
    pub identity: OwnNetns,
    /// Bit of the packet mark by which `from_pod` passes exemptions of pods behind a bridge to `node_egress`.
    pub mark: u32,
}

impl Datapath {
    /// Opens the pinned maps, or creates new ones if none are pinned or their layout differs, loads the programs, and adopts
    /// pinned links. Attached programs of an earlier agent run until [`Datapath::apply`] replaces them.
    ///
    /// On failure, removes the pin directory if this process has created it.
    pub fn open(
        claim: PinLock,
        datapath_config: &DatapathConfig,
        endpoint_set: &EndpointSet,
        netlink: Netlink,
    ) -> Result<Self, DatapathError> {
        let DatapathConfig { backend, hooks, .. } = *datapath_config;
        match Self::load(claim.dir(), datapath_config, endpoint_set) {
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
        datapath_config: &DatapathConfig,
        endpoint_set: &EndpointSet,
    ) -> Result<(Programs, Maps, Links, Cgroups), DatapathError> {
        home::ensure_not_in_use(pins)?;
        for reason in object::unpin_incompatible_maps(pins)? {
            log::warn!("starting with new maps and counters: {reason}");
        }
        let programs = Programs::load(
            pins,
            datapath_config.hooks,
            &endpoints::filter_while_loading(pins, endpoint_set),
        )?;
        let mut maps = Maps::open(pins)?;
        force::write(&mut maps, datapath_config, endpoint_set)?;
        programs.pin(pins)?;
        let links = Links::adopt(pins)?;
        let cgroups = Cgroups::adopt(pins, datapath_config)?;
        Ok((programs, maps, links, cgroups))
    }

    /// Returns the pin directory of this agent.
    #[must_use]
    pub fn pins(&self) -> &PinDir {
        self.claim.dir()
    }

    /// Opens the log of the programs.
    pub fn diagnostics(&self) -> Result<BpfLog, BpfLogError> {
        BpfLog::open(self.programs.ids().next().unwrap_or_default())
    }

    /// Returns the desired attach mode of a hook, on an interface with the desired `hooks`.
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

    /// Records the state of an interface, for `status` and for the agent after a restart.
    pub fn record(&mut self, link: &Link, state: LinkState) -> Result<(), DatapathError> {
        records::put(&mut self.maps, link, state)
    }

    /// Updates the record of an interface after its veth peer was reconciled.
    pub fn update_own_packets(&mut self, link: &Link) -> Result<(), DatapathError> {
        records::update_own_packets(&mut self.maps, link)
    }

    /// Reports whether the record of the interface has a program at this hook.
    #[must_use]
    pub fn was_attached(&self, link: &Link, hook: TcHook) -> bool {
        records::get(&self.maps, link.index).is_some_and(|record| record.is_attached(hook))
    }

    /// Reports whether the record of the interface has a pending attachment.
    #[must_use]
    pub fn was_pending(&self, link: &Link) -> bool {
        records::get(&self.maps, link.index)
            .is_some_and(|record| record.pending == 1 && record.name == records::padded(&link.name))
    }

    /// Removes the state of a deleted interface whose index `link` has now.
    pub fn claim_ifindex(&mut self, link: &Link) -> Result<(), DatapathError> {
        let owns_qdisc = records::get(&self.maps, link.index)
            .is_some_and(|record| record.owns_qdisc == 1 && record.name == records::padded(&link.name));
        self.remove_interface(link.index)?;
        // The name has not changed, so it is probably the same interface, and another program has removed the filter. The
        // qdisc still belongs to the agent.
        if owns_qdisc { records::set_owns_qdisc(&mut self.maps, link, TcHook::FromPod) } else { Ok(()) }
    }

    /// Removes all state of a deleted interface. Adds its counters to those of deleted interfaces.
    pub fn remove_interface(&mut self, ifindex: u32) -> Result<(), DatapathError> {
        // Revokes the exemptions first, because a new interface may already have the index.
        self.revoke(ifindex)?;
        self.refused_netkit.remove(&ifindex);
        for hook in TcHook::ALL {
            self.links.forget(self.claim.dir(), AttachPoint { ifindex, hook })?;
        }
        // A killed `verify` may have left its probe.
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
    pub fn sync_pod_names(
        &mut self,
        names: &BTreeMap<Subject, PodContainer<'_>>,
    ) -> Result<usize, DatapathError> {
        pods::write(&mut self.maps, &mut self.told, names)
    }

    /// Records the status of the pod watch; `None` means that it is off.
    pub fn record_watch_status(&mut self, lookup: Option<&PodWatchStatus>) -> Result<(), DatapathError> {
        pods::put(&mut self.maps, lookup)
    }

    /// Reads all exemptions from the map.
    pub fn granted(&self) -> Result<Grants, DatapathError> {
        exemptions::read(&self.maps).map_err(|source| DatapathError::Map { map: MAP_EXEMPT, source })
    }

    /// Marks the agent as ready: `status` then reports that every interface was reconciled.
    pub fn set_ready(&mut self) -> Result<(), DatapathError> {
        Ok(self.claim.set_ready()?)
    }

    /// Restores missing pins. Returns `true` if any was missing.
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
