//! Management of BPF objects: loads, pins, attaches, replaces and removes programs, maps and links.

pub mod attach;
pub mod bpf_log;
mod datapath_error;
pub mod exemption_set;
mod loader;
pub mod maps;
pub mod object;
pub mod pin;
mod program_features;
mod programs;
pub mod sys;

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use imds_ebpf_common::{
    AttachMode, DenyAction, DenyErrno, Hook, Mode, Subject, SubjectKind, TcHook, TcHookSet,
};

pub(crate) use self::datapath_error::map_error;
use self::{
    attach::{cgroup_hooks::Cgroups, mprog::Links, netns_identity::hooks_without_identity},
    maps::pod_names::WrittenNames,
    object::{Maps, Programs},
    pin::{
        dir::{AttachPoint, PinDir},
        lock::PinLock,
    },
};
pub use self::{
    datapath_error::DatapathError,
    pin::unload::{Progress, Removed, unload, unload_stopped},
};
use crate::{
    config::{Hooks, Sendmsg, endpoint_set::EndpointSet},
    datapath::{
        bpf_log::{BpfLog, BpfLogError},
        exemption_set::ExemptionSet,
        pin::rollback::Rollback,
    },
    memory,
    node::{link::Link, netlink::Netlink, netns::OwnNetns},
};

/// Programs, maps and links of the pin directory that this process has locked.
pub struct Datapath {
    pin_lock: PinLock,
    programs: Programs,
    maps: Maps,
    links: Links,
    cgroups: Cgroups,
    /// Cache of the pod names in the map; `None` until they are read.
    written_names: Option<WrittenNames>,
    /// Cache of the exemptions in the maps; `None` until they are read.
    known_exemptions: Option<ExemptionSet>,
    netlink: Netlink,
    backend: AttachMode,
    /// Indices of interfaces on which the kernel rejected a netkit link.
    rejected_netkit: BTreeSet<u32>,
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
    /// Setting of the sendmsg programs of the `socket` hook.
    pub sendmsg: Sendmsg,
    /// Attach mode of interfaces, except netkit devices.
    pub backend: AttachMode,
    /// Cgroup of the hooks that have one; `None` if they are off or no cgroup v2 hierarchy is mounted.
    pub cgroup: Option<PathBuf>,
    /// Network namespace of the node, as the programs identify it. `None` if they can't: the hooks that compare it are then
    /// not attached.
    pub identity: Option<OwnNetns>,
}

impl DatapathConfig {
    /// Returns the cgroup to which the programs of a hook are attached; `None` if the hook is off or can't be attached.
    pub fn cgroup_of(&self, hook: Hook) -> Option<&Path> {
        let lacks_identity = hooks_without_identity(self.hooks, self.identity).contains(&hook);
        self.cgroup.as_deref().filter(|_| self.hooks.contains(hook) && !lacks_identity)
    }
}

impl Datapath {
    /// Opens the pinned maps, or creates new ones if none are pinned or their layout differs, loads the programs, and adopts
    /// pinned links. Attached programs of an earlier agent run until [`Datapath::apply`] replaces them.
    ///
    /// On failure, restores pins, endpoints and policy as they were before. A rejected program is no failure as long as
    /// another one is loaded.
    pub fn open(
        pin_lock: PinLock,
        datapath_config: &DatapathConfig,
        endpoint_set: &EndpointSet,
        netlink: Netlink,
    ) -> Result<Self, DatapathError> {
        let DatapathConfig { backend, hooks, .. } = *datapath_config;
        let (programs, maps, links, cgroups) = match Self::load(&pin_lock.dir, datapath_config, endpoint_set)
        {
            Ok(loaded) => loaded,
            Err(error) => {
                if pin_lock.is_new {
                    pin_lock.remove()?;
                }
                return Err(error);
            }
        };
        Ok(Self {
            pin_lock,
            programs,
            maps,
            links,
            cgroups,
            written_names: None,
            known_exemptions: None,
            netlink,
            backend,
            rejected_netkit: BTreeSet::new(),
            hooks,
        })
    }

    fn load(
        pins: &PinDir,
        datapath_config: &DatapathConfig,
        endpoint_set: &EndpointSet,
    ) -> Result<(Programs, Maps, Links, Cgroups), DatapathError> {
        pin::netns_owner::ensure_not_in_use(pins)?;
        let reasons = object::incompatible_maps(pins)?;
        let rollback = Rollback::new(pins, reasons.is_empty())?;
        let loaded = Self::load_all(pins, datapath_config, endpoint_set, &rollback, reasons.is_empty());
        if loaded.is_ok() {
            for reason in reasons {
                log::warn!("starting with new maps and counters: {reason}");
            }
        } else if let Err(error) = rollback.restore() {
            let error = anyhow::Error::from(error);
            log::error!("failed to restore the state before the failed start: {error:#}");
        }
        loaded
    }

    /// Creates or opens everything first, then replaces the pins. Writes the policy last, because attached programs of an
    /// earlier agent use it immediately.
    fn load_all(
        pins: &PinDir,
        datapath_config: &DatapathConfig,
        endpoint_set: &EndpointSet,
        rollback: &Rollback,
        is_compatible: bool,
    ) -> Result<(Programs, Maps, Links, Cgroups), DatapathError> {
        let filter = maps::endpoint_maps::filter_while_loading(rollback.filter(), endpoint_set);
        let object = object::load_maps(Some(pins).filter(|_| is_compatible), &filter)?;
        let programs = Programs::load(object, pins, datapath_config.hooks)?;
        let mut maps = programs.maps()?;
        let links = Links::adopt(pins)?;
        let cgroups = Cgroups::adopt(pins, datapath_config)?;
        maps.restore_pins(pins)?;
        programs.pin(pins)?;
        programs.record_rejected(&mut maps)?;
        maps::policy::write(&mut maps, datapath_config, endpoint_set)?;
        memory::drop_constant(object::OBJECT);
        Ok((programs, maps, links, cgroups))
    }

    /// Returns the pin directory of this agent.
    pub fn pins(&self) -> &PinDir {
        &self.pin_lock.dir
    }

    /// Returns the reason why nothing is pinned; `None` if a bpffs is mounted.
    pub fn pin_failure(&self) -> Option<&str> {
        self.pin_lock.failure.as_deref()
    }

    /// Returns an error text for each rejected program.
    pub fn rejections(&self) -> impl Iterator<Item = &str> {
        self.programs.rejections()
    }

    /// Tries to load the programs that the kernel rejected again.
    pub fn retry_rejected(&mut self) -> Result<(), DatapathError> {
        let pins = &self.pin_lock.dir;
        if self.programs.retry_rejected(pins)? {
            self.programs.pin(pins)?;
            self.programs.record_rejected(&mut self.maps)?;
        }
        Ok(())
    }

    /// Opens the log of the programs.
    pub fn diagnostics(&self) -> Result<BpfLog, BpfLogError> {
        BpfLog::open(self.programs.ids().next().unwrap_or_default())
    }

    /// Returns the desired attach mode of a hook, on an interface with the desired `hooks`.
    pub fn desired_mode(&self, link: &Link, hooks: TcHookSet, hook: TcHook) -> AttachMode {
        let is_desired = self.hooks.contains(hook.hook()) && hooks.contains(hook);
        if is_desired { self.attach_mode(link, hook) } else { AttachMode::None }
    }

    /// Returns the indices of interfaces with a pinned link or a record.
    pub fn recorded_ifindexes(&self) -> Vec<u32> {
        let mut ifindexes: Vec<u32> =
            self.links.ifindexes().chain(self.maps.interfaces.keys().flatten()).collect();
        ifindexes.sort_unstable();
        ifindexes.dedup();
        ifindexes
    }

    /// Removes all state of a deleted interface. Adds its counters to those of deleted interfaces.
    pub fn remove_interface(&mut self, ifindex: u32) -> Result<(), DatapathError> {
        // Removes the exemptions first, because a new interface may already have the index.
        self.remove_exemptions(ifindex)?;
        self.rejected_netkit.remove(&ifindex);
        for hook in TcHook::ALL {
            self.links.remove_point(&self.pin_lock.dir, AttachPoint { ifindex, hook })?;
        }
        let subject = Subject::new(SubjectKind::Interface, ifindex.into());
        // Events of the next interface with this index must not name the pod.
        self.remove_pod_name(subject)?;
        // A killed `verify` may have left its probe.
        let _no_probe = self.maps.probes.remove(&subject);
        maps::counters::retire(&mut self.maps, ifindex)?;
        maps::interface_records::remove(&mut self.maps, ifindex);
        Ok(())
    }

    /// Marks the agent as ready: `status` then reports that every interface was reconciled.
    pub fn set_ready(&mut self) -> Result<(), DatapathError> {
        Ok(self.pin_lock.set_ready()?)
    }

    /// Restores missing pins. Returns `true` if any was missing.
    pub fn restore_pins(&mut self) -> Result<bool, DatapathError> {
        let mut missing = self.pin_lock.restore()?;
        if self.pin_failure().is_some() {
            return Ok(false);
        }
        let pins = &self.pin_lock.dir;
        if self.programs.is_unpinned(pins) {
            self.programs.pin(pins)?;
            missing = true;
        }
        missing |= self.maps.restore_pins(pins)?;
        Ok(missing)
    }
}
