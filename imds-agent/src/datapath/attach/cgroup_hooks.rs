//! Reconciles the programs of the cgroup hooks: `socket`, `host_network`, `local_service` and `node_allow`.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
};

use imds_ebpf_common::{CgroupRecord, Hook, cgroup::SENDMSG_OFF, names::MAP_CGROUP};

use super::{
    cgroup_link::{CgroupChange, CgroupChangeKind},
    cgroup_programs::{self, CgroupHookLinks, CgroupProgramKind, LOCAL_SERVICE, ON_ONE_CGROUP},
    host_cgroups::{self, HostNetworkLinks},
    netns_identity::{hooks_without_identity, no_cookie, no_cookie_remedy, runs_earlier_programs},
    sendmsg::{SendmsgInputs, SendmsgReason, sendmsg_reason},
};
use crate::{
    config::{Hooks, Sendmsg},
    datapath::{
        Datapath, DatapathConfig, DatapathError, map_error,
        object::{self, Maps},
        pin::dir::PinDir,
    },
    node::{cgroup, netns::OwnNetns},
};

/// Failure of the `socket` hook on a node without cgroup v2.
pub const NO_CGROUP: &str = "socket is not attached: no cgroup v2 hierarchy is mounted";
/// Failure of the `node_allow` hook on a node without cgroup v2.
pub const NO_CGROUP_FOR_NODE: &str = "node_allow is not attached: no cgroup v2 hierarchy is mounted";
/// Remedy for [`NO_CGROUP_FOR_NODE`].
pub const NO_CGROUP_FOR_NODE_REMEDY: &str =
    "mount cgroup2 (`mount -t cgroup2 cgroup2 /sys/fs/cgroup`), set `run --cgroup`, or remove node.allow";
/// Remedy for [`NO_CGROUP`].
pub const NO_CGROUP_REMEDY: &str = "mount cgroup2 (`mount -t cgroup2 cgroup2 /sys/fs/cgroup`), set `run --cgroup`, or set hooks.socket = false";

/// Hooks that are not attached on a node without cgroup v2, each with the failure and its remedy.
const NEEDING_CGROUP: [(Hook, &str, &str); 2] = [
    (Hook::Socket, NO_CGROUP, NO_CGROUP_REMEDY),
    (Hook::NodeAllow, NO_CGROUP_FOR_NODE, NO_CGROUP_FOR_NODE_REMEDY),
];

/// Programs on cgroups, and the inputs that decide which of them are attached.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "independent inputs")]
pub(crate) struct Cgroups {
    /// Links of the hooks of [`ON_ONE_CGROUP`].
    links: BTreeMap<Hook, CgroupHookLinks>,
    hosts: HostNetworkLinks,
    /// True if the kernel reports the network namespace of packets at cgroups, which the packet program of `node_allow` needs.
    has_cgroup_cookie: bool,
    /// Network namespace of the node, if the programs can identify it.
    identity: Option<OwnNetns>,
    /// Descriptions of the hooks that are on, and can't be attached without that identity.
    identity_problems: Vec<String>,
    /// True if a protected address is local to the node; `None` until the routes are read.
    is_local: Option<bool>,
    setting: Sendmsg,
    hooks: Hooks,
    has_tc_cookie: bool,
    is_enforced: bool,
    sendmsg: Option<SendmsgReason>,
    /// True if connections are redirected, which the getpeername programs hide.
    has_redirects: bool,
    /// Record that was written last.
    recorded: Option<CgroupRecord>,
}

impl Cgroups {
    /// Opens the links that earlier agents pinned for the cgroup of `datapath_config`.
    pub(crate) fn adopt(pins: &PinDir, datapath_config: &DatapathConfig) -> Result<Self, DatapathError> {
        let mut cgroups = Self {
            links: BTreeMap::new(),
            hosts: HostNetworkLinks::default(),
            has_cgroup_cookie: object::cgroup_has_cookie(),
            identity: datapath_config.identity,
            identity_problems: Vec::new(),
            is_local: None,
            setting: datapath_config.sendmsg,
            hooks: datapath_config.hooks,
            has_tc_cookie: object::tc_has_cookie(),
            is_enforced: true,
            sendmsg: None,
            has_redirects: false,
            recorded: None,
        };
        cgroups.prepare(pins, datapath_config)?;
        for (_, failure, remedy) in
            NEEDING_CGROUP.into_iter().filter(|(hook, ..)| cgroups.lacks_cgroup(*hook))
        {
            log::error!("{failure}; {remedy}");
        }
        Ok(cgroups)
    }

    fn adopt_missing(
        &mut self,
        pins: &PinDir,
        datapath_config: &DatapathConfig,
    ) -> Result<(), DatapathError> {
        for kind in ON_ONE_CGROUP {
            let Some(cgroup) = datapath_config.cgroup_of(kind.hook) else { continue };
            if self.links.contains_key(&kind.hook) {
                continue;
            }
            match CgroupHookLinks::adopt(pins, cgroup, kind) {
                Ok(links) => drop(self.links.insert(kind.hook, links)),
                // The agent starts without this hook, because most nodes never need it.
                Err(error) if kind.hook == Hook::LocalService => {
                    log::warn!("local_service is not attached: {:#}", anyhow::Error::from(error));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Reports whether the hook is on but can't be attached, because its programs can't identify the node's network namespace.
    /// Links of an earlier agent stay.
    fn lacks_identity(&self, hook: Hook) -> bool {
        hooks_without_identity(self.hooks, self.identity).contains(&hook)
    }

    /// Reports whether the hook is one of [`NEEDING_CGROUP`], and on, but has no cgroup.
    fn lacks_cgroup(&self, hook: Hook) -> bool {
        NEEDING_CGROUP.into_iter().any(|(needing, ..)| needing == hook)
            && !self.links.contains_key(&hook)
            && self.hooks.contains(hook)
            && self.identity.is_some()
    }

    /// Finds the hooks that can't be attached because the programs can't identify the node's network namespace. Logs those that
    /// were not found before.
    fn check_identity(&mut self, pins: &PinDir) -> Result<(), DatapathError> {
        let hooks = hooks_without_identity(self.hooks, self.identity);
        let problem = |&hook| Ok(no_cookie(hook, runs_earlier_programs(pins, hook)?));
        let found = hooks.iter().map(problem).collect::<Result<Vec<_>, DatapathError>>()?;
        for (&hook, problem) in hooks.iter().zip(&found) {
            if !self.identity_problems.contains(problem) {
                log::error!("{problem}; {}", no_cookie_remedy(hook));
            }
        }
        self.identity_problems = found;
        Ok(())
    }

    /// Adds the programs of `datapath_config` to the desired programs.
    pub(crate) fn prepare(
        &mut self,
        pins: &PinDir,
        datapath_config: &DatapathConfig,
    ) -> Result<(), DatapathError> {
        (self.setting, self.hooks) = (datapath_config.sendmsg, datapath_config.hooks);
        self.sendmsg = self.sendmsg_reason().or(self.sendmsg);
        self.identity = datapath_config.identity;
        self.check_identity(pins)?;
        self.adopt_missing(pins, datapath_config)
    }

    /// Reports whether the desired programs are exactly those of `datapath_config`.
    pub(crate) fn matches(&self, datapath_config: &DatapathConfig) -> bool {
        self.setting == datapath_config.sendmsg && self.sendmsg == self.sendmsg_reason()
    }

    /// Removes the programs that `datapath_config` does not need from the desired programs. The next reconciliation detaches
    /// them.
    pub(crate) fn release(
        &mut self,
        pins: &PinDir,
        datapath_config: &DatapathConfig,
    ) -> Result<(), DatapathError> {
        (self.setting, self.hooks) = (datapath_config.sendmsg, datapath_config.hooks);
        self.sendmsg = self.sendmsg_reason();
        self.links.retain(|hook, _| datapath_config.hooks.contains(*hook));
        if !datapath_config.hooks.contains(Hook::HostNetwork) {
            self.hosts = HostNetworkLinks::default();
        }
        self.check_identity(pins)
    }

    fn sendmsg_reason(&self) -> Option<SendmsgReason> {
        let Self { setting, hooks, has_tc_cookie, is_enforced, .. } = *self;
        sendmsg_reason(SendmsgInputs { setting, hooks, has_tc_cookie, is_enforced })
    }

    /// Writes the desired state for `status`, if it has changed.
    fn record(&mut self, maps: &mut Maps) -> Result<(), DatapathError> {
        let record = CgroupRecord {
            cgroup: self.links.values().next().map(CgroupHookLinks::id).unwrap_or_default(),
            sendmsg: match (self.sendmsg, self.setting) {
                (Some(reason), _) => reason as u32,
                (None, Sendmsg::Off) => SENDMSG_OFF,
                (None, Sendmsg::Auto | Sendmsg::On) => 0,
            },
            local_service: u32::from(self.is_local == Some(true)),
        };
        if self.recorded == Some(record) {
            return Ok(());
        }
        maps.cgroup.set(0, record, 0).map_err(map_error(MAP_CGROUP))?;
        self.recorded = Some(record);
        Ok(())
    }
}

impl Datapath {
    /// Reports whether the hook is on but can't be attached, because its programs can't identify the node's network namespace.
    pub fn lacks_identity(&self, hook: Hook) -> bool {
        self.cgroups.lacks_identity(hook)
    }

    /// Describes the programs that are not attached to their cgroup, or not last there.
    pub fn cgroup_failures(&self) -> impl Iterator<Item = &str> {
        let Cgroups { links, hosts, identity_problems, .. } = &self.cgroups;
        let attached = links.values().flat_map(CgroupHookLinks::failures);
        let missing = NEEDING_CGROUP.into_iter().filter(|(hook, ..)| self.cgroups.lacks_cgroup(*hook));
        let missing = missing.map(|(_, failure, _)| failure);
        attached.chain(hosts.failures()).chain(missing).chain(identity_problems.iter().map(String::as_str))
    }

    /// Reconciles the programs of the `socket`, `local_service` and `node_allow` hooks. A program that cannot be attached is
    /// reported once, as a change of kind [`CgroupChangeKind::Failed`]. The next call tries again.
    pub fn restore_sockets(&mut self) -> Result<Vec<CgroupChange>, DatapathError> {
        // Continues after a failure: attaches programs even if writing the record fails, and each hook even if another fails.
        let recorded = self.cgroups.record(&mut self.maps);
        let restored = ON_ONE_CGROUP.map(|kind| self.restore_hook(kind));
        let changes = restored.into_iter().collect::<Result<Vec<_>, _>>()?;
        recorded.map(|()| changes.into_iter().flatten().collect())
    }

    /// Reports whether a hook of the whole node denies requests of a new pod until `from_pod` is attached to its interface.
    pub fn has_node_wide_hook(&self) -> bool {
        let sockets = self.cgroups.links.get(&Hook::Socket);
        let has_sockets = sockets.is_some_and(|sockets| sockets.failures().next().is_none());
        let has_egress =
            self.hooks.contains(Hook::NodeEgress) && self.programs.has_programs_of(Hook::NodeEgress);
        has_egress || (self.hooks.contains(Hook::Socket) && has_sockets)
    }

    fn restore_hook(&mut self, kind: CgroupProgramKind) -> Result<Vec<CgroupChange>, DatapathError> {
        let (pins, hook) = (&self.pin_lock.dir, kind.hook);
        if self.cgroups.lacks_cgroup(hook) {
            // Links of an earlier agent stay until a cgroup v2 hierarchy is mounted.
            let Some(root) = cgroup::root().ok().flatten() else { return Ok(Vec::new()) };
            self.cgroups.links.insert(hook, CgroupHookLinks::adopt(pins, &root, kind)?);
            log::info!("found a cgroup v2 hierarchy at {}", root.display());
        }
        if self.cgroups.lacks_identity(hook) {
            return Ok(Vec::new());
        }
        let Cgroups { links, sendmsg, has_redirects, has_cgroup_cookie, is_local, .. } = &mut self.cgroups;
        let is_desired = |attach_type| match hook {
            Hook::Socket => {
                (sendmsg.is_some() || !cgroup_programs::is_sendmsg(attach_type))
                    && (*has_redirects || !cgroup_programs::is_peer(attach_type))
            }
            Hook::LocalService => *is_local == Some(true),
            Hook::NodeAllow => *has_cgroup_cookie || !cgroup_programs::is_packet(attach_type),
            Hook::FromPod | Hook::NodeEgress | Hook::HostNetwork => true,
        };
        match links.get_mut(&hook) {
            // The program of an earlier agent stays until the routes are read.
            Some(_) if hook == Hook::LocalService && is_local.is_none() => Ok(Vec::new()),
            Some(links) => links.restore(&self.programs, is_desired),
            None => Ok(detached_hook(cgroup_programs::detach(pins, kind)?, hook)),
        }
    }

    /// Reconciles the program of the `local_service` hook, which is attached only while a protected address is local to the
    /// node.
    pub fn restore_local_service(&mut self, is_local: bool) -> Result<Vec<CgroupChange>, DatapathError> {
        self.cgroups.is_local = Some(is_local);
        let recorded = self.cgroups.record(&mut self.maps);
        let changes = self.restore_hook(LOCAL_SERVICE)?;
        recorded.map(|()| changes)
    }

    /// Reports whether the socket hook can redirect connections: it is on and has a cgroup.
    pub fn can_redirect(&self) -> bool {
        self.hooks.contains(Hook::Socket)
            && self.cgroups.links.contains_key(&Hook::Socket)
            && !self.cgroups.lacks_identity(Hook::Socket)
    }

    /// Attaches the getpeername programs if connections are redirected, and detaches them otherwise.
    pub fn set_has_redirects(&mut self, has_redirects: bool) -> Result<Vec<CgroupChange>, DatapathError> {
        if self.cgroups.has_redirects == has_redirects {
            return Ok(Vec::new());
        }
        self.cgroups.has_redirects = has_redirects;
        let mut changes = self.restore_hook(cgroup_programs::SOCKETS)?;
        // No correction of another program's change.
        for change in &mut changes {
            change.is_new = true;
        }
        Ok(changes)
    }

    /// Attaches or detaches the sendmsg programs as needed. `is_enforced` is true if all interfaces are enforced.
    pub fn set_enforced(&mut self, is_enforced: bool) -> Result<Vec<CgroupChange>, DatapathError> {
        self.cgroups.is_enforced = is_enforced;
        let reason = self.cgroups.sendmsg_reason();
        if self.cgroups.sendmsg == reason {
            return Ok(Vec::new());
        }
        self.cgroups.sendmsg = reason;
        self.restore_sockets()
    }

    /// Reconciles the programs of the `host_network` hook on these cgroups of Kubernetes pods. Removes links on other cgroups
    /// if `all` is set: then the list is complete.
    pub fn restore_host_network(
        &mut self,
        cgroups: &BTreeSet<PathBuf>,
        all: bool,
    ) -> Result<Vec<CgroupChange>, DatapathError> {
        let pins = &self.pin_lock.dir;
        if !self.hooks.contains(Hook::HostNetwork) {
            return Ok(detached_hook(host_cgroups::detach_all(pins)?, Hook::HostNetwork));
        }
        if self.cgroups.lacks_identity(Hook::HostNetwork) {
            return Ok(Vec::new());
        }
        let mut changes = self.cgroups.hosts.restore(pins, &self.programs, cgroups)?;
        if all {
            changes.extend(self.cgroups.hosts.detach_others(pins)?);
        }
        Ok(changes)
    }
}

fn detached_hook(was_attached: bool, hook: Hook) -> Vec<CgroupChange> {
    let text = format!("detached the programs of the {} hook", hook.name());
    was_attached.then(|| CgroupChange::new(CgroupChangeKind::Detached, text)).into_iter().collect()
}
