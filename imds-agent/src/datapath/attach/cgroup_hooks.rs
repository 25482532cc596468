//! Reconciles the programs of the cgroup hooks: `socket`, `host_network`, `local_service` and `node_allow`.

use std::{collections::BTreeSet, path::PathBuf};

use imds_ebpf_common::{CgroupRecord, Hook, cgroup::SENDMSG_OFF, names::MAP_CGROUP};

use super::{
    cgroup_link::{CgroupChange, CgroupChangeKind},
    cgroup_programs::{self, CgroupHookLinks, LOCAL_SERVICE, NODE_ALLOW, SOCKETS},
    host_cgroups::{self, HostNetworkLinks},
    netns_identity::{hooks_without_identity, no_cookie, no_cookie_remedy, runs_earlier_programs},
    sendmsg::{SendmsgInputs, SendmsgReason, sendmsg_reason},
};
use crate::{
    config::{Hooks, Sendmsg},
    datapath::{
        Datapath, DatapathConfig, DatapathError,
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

/// Programs on cgroups, and the inputs that decide which of them are attached.
#[derive(Debug)]
pub(crate) struct Cgroups {
    sockets: Option<CgroupHookLinks>,
    hosts: HostNetworkLinks,
    local_service: Option<CgroupHookLinks>,
    node_allow: Option<CgroupHookLinks>,
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
    /// Record that was written last.
    recorded: Option<CgroupRecord>,
}

impl Cgroups {
    /// Opens the links that earlier agents pinned for the cgroup of `datapath_config`.
    pub(crate) fn adopt(pins: &PinDir, datapath_config: &DatapathConfig) -> Result<Self, DatapathError> {
        let mut cgroups = Self {
            sockets: None,
            hosts: HostNetworkLinks::default(),
            local_service: None,
            node_allow: None,
            has_cgroup_cookie: object::cgroup_has_cookie(),
            identity: datapath_config.identity,
            identity_problems: Vec::new(),
            is_local: None,
            setting: datapath_config.sendmsg,
            hooks: datapath_config.hooks,
            has_tc_cookie: object::tc_has_cookie(),
            is_enforced: true,
            sendmsg: None,
            recorded: None,
        };
        cgroups.sendmsg = cgroups.sendmsg_reason();
        cgroups.check_identity(pins)?;
        cgroups.adopt_missing(pins, datapath_config)?;
        if cgroups.lacks_cgroup() {
            log::error!("{NO_CGROUP}; {NO_CGROUP_REMEDY}");
        }
        if cgroups.lacks_node_cgroup() {
            log::error!("{NO_CGROUP_FOR_NODE}; {NO_CGROUP_FOR_NODE_REMEDY}");
        }
        Ok(cgroups)
    }

    fn adopt_missing(
        &mut self,
        pins: &PinDir,
        datapath_config: &DatapathConfig,
    ) -> Result<(), DatapathError> {
        let has_identity = self.identity.is_some();
        if let (None, Some(cgroup), true) = (&self.sockets, &datapath_config.cgroup, has_identity) {
            self.sockets = Some(CgroupHookLinks::adopt(pins, cgroup, SOCKETS)?);
        }
        if let (None, Some(cgroup), true) = (&self.node_allow, &datapath_config.node_allow, has_identity) {
            self.node_allow = Some(CgroupHookLinks::adopt(pins, cgroup, NODE_ALLOW)?);
        }
        if let (None, Some(cgroup)) = (&self.local_service, &datapath_config.local_service) {
            // The agent starts without this hook, because most nodes never need it.
            match CgroupHookLinks::adopt(pins, cgroup, LOCAL_SERVICE) {
                Ok(local_service) => self.local_service = Some(local_service),
                Err(error) => log::warn!("local_service is not attached: {:#}", anyhow::Error::from(error)),
            }
        }
        Ok(())
    }

    /// Reports whether the hook is on but can't be attached, because its programs can't identify the node's network namespace.
    /// Links of an earlier agent stay.
    fn lacks_identity(&self, hook: Hook) -> bool {
        hooks_without_identity(self.hooks, self.identity).contains(&hook)
    }

    /// Reports whether the `socket` hook is on but has no cgroup.
    fn lacks_cgroup(&self) -> bool {
        self.sockets.is_none() && self.hooks.contains(Hook::Socket) && self.identity.is_some()
    }

    /// Reports whether the `node_allow` hook is on and has no cgroup.
    fn lacks_node_cgroup(&self) -> bool {
        self.node_allow.is_none() && self.hooks.contains(Hook::NodeAllow) && self.identity.is_some()
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
        if !datapath_config.hooks.contains(Hook::Socket) {
            self.sockets = None;
        }
        if !datapath_config.hooks.contains(Hook::HostNetwork) {
            self.hosts = HostNetworkLinks::default();
        }
        if !datapath_config.hooks.contains(Hook::LocalService) {
            self.local_service = None;
        }
        if !datapath_config.hooks.contains(Hook::NodeAllow) {
            self.node_allow = None;
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
            cgroup: [&self.sockets, &self.local_service, &self.node_allow]
                .into_iter()
                .find_map(|cgroup| cgroup.as_ref().map(CgroupHookLinks::id))
                .unwrap_or_default(),
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
        maps.cgroup.set(0, record, 0).map_err(|source| DatapathError::Map { map: MAP_CGROUP, source })?;
        self.recorded = Some(record);
        Ok(())
    }
}

impl Datapath {
    /// Reports whether the hook is on but can't be attached, because its programs can't identify the node's network namespace.
    #[must_use]
    pub fn lacks_identity(&self, hook: Hook) -> bool {
        self.cgroups.lacks_identity(hook)
    }

    /// Describes the programs that are not attached to their cgroup, or not last there.
    pub fn cgroup_failures(&self) -> impl Iterator<Item = &str> {
        let Cgroups { sockets, hosts, local_service, node_allow, identity_problems, .. } = &self.cgroups;
        let attached =
            sockets.iter().chain(local_service).chain(node_allow).flat_map(CgroupHookLinks::failures);
        let missing = [
            (NO_CGROUP, self.cgroups.lacks_cgroup()),
            (NO_CGROUP_FOR_NODE, self.cgroups.lacks_node_cgroup()),
        ];
        let missing = missing.into_iter().filter_map(|(failure, is_missing)| is_missing.then_some(failure));
        attached.chain(hosts.failures()).chain(missing).chain(identity_problems.iter().map(String::as_str))
    }

    /// Reconciles the programs of the `socket`, `local_service` and `node_allow` hooks. A program that cannot be attached is
    /// reported once, as a change of kind [`CgroupChangeKind::Failed`]. The next call tries again.
    pub fn restore_sockets(&mut self) -> Result<Vec<CgroupChange>, DatapathError> {
        // Continues after a failure: attaches programs even if writing the record fails, and each hook even if another fails.
        let recorded = self.cgroups.record(&mut self.maps);
        let sockets = self.restore_socket_hook();
        let local_service = self.restore_local_service_hook();
        let node_allow = self.restore_node_allow_hook();
        let mut changes = sockets?;
        changes.extend(local_service?);
        changes.extend(node_allow?);
        recorded.map(|()| changes)
    }

    /// Reports whether a hook of the whole node denies requests of a new pod until `from_pod` is attached to its interface.
    #[must_use]
    pub fn has_node_wide_hook(&self) -> bool {
        let has_sockets =
            self.cgroups.sockets.as_ref().is_some_and(|sockets| sockets.failures().next().is_none());
        let has_egress =
            self.hooks.contains(Hook::NodeEgress) && self.programs.has_programs_of(Hook::NodeEgress);
        has_egress || (self.hooks.contains(Hook::Socket) && has_sockets)
    }

    fn restore_socket_hook(&mut self) -> Result<Vec<CgroupChange>, DatapathError> {
        if self.cgroups.lacks_cgroup() {
            // Links of an earlier agent stay until a cgroup v2 hierarchy is mounted.
            let Some(root) = cgroup::root().ok().flatten() else { return Ok(Vec::new()) };
            self.cgroups.sockets = Some(CgroupHookLinks::adopt(self.pin_lock.dir(), &root, SOCKETS)?);
            log::info!("found a cgroup v2 hierarchy at {}", root.display());
        }
        if self.cgroups.lacks_identity(Hook::Socket) {
            return Ok(Vec::new());
        }
        let needs_sendmsg = self.cgroups.sendmsg.is_some();
        if let Some(sockets) = &mut self.cgroups.sockets {
            let is_desired = |attach_type| needs_sendmsg || !cgroup_programs::is_sendmsg(attach_type);
            return sockets.restore(&self.programs, is_desired);
        }
        let detached = cgroup_programs::detach(self.pin_lock.dir(), SOCKETS)?;
        Ok(detached_hook(detached, Hook::Socket))
    }

    fn restore_local_service_hook(&mut self) -> Result<Vec<CgroupChange>, DatapathError> {
        match (&mut self.cgroups.local_service, self.cgroups.is_local) {
            // The program of an earlier agent stays until the routes are read.
            (Some(_), None) => Ok(Vec::new()),
            (Some(local_service), Some(is_local)) => local_service.restore(&self.programs, |_| is_local),
            (None, _) => {
                let detached = cgroup_programs::detach(self.pin_lock.dir(), LOCAL_SERVICE)?;
                Ok(detached_hook(detached, Hook::LocalService))
            }
        }
    }

    fn restore_node_allow_hook(&mut self) -> Result<Vec<CgroupChange>, DatapathError> {
        if self.cgroups.lacks_node_cgroup() {
            // Links of an earlier agent stay until a cgroup v2 hierarchy is mounted.
            let Some(root) = cgroup::root().ok().flatten() else { return Ok(Vec::new()) };
            self.cgroups.node_allow = Some(CgroupHookLinks::adopt(self.pin_lock.dir(), &root, NODE_ALLOW)?);
        }
        if self.cgroups.lacks_identity(Hook::NodeAllow) {
            return Ok(Vec::new());
        }
        let has_packets = self.cgroups.has_cgroup_cookie;
        if let Some(node_allow) = &mut self.cgroups.node_allow {
            let is_desired = |attach_type| has_packets || !cgroup_programs::is_packet(attach_type);
            return node_allow.restore(&self.programs, is_desired);
        }
        let detached = cgroup_programs::detach(self.pin_lock.dir(), NODE_ALLOW)?;
        Ok(detached_hook(detached, Hook::NodeAllow))
    }

    /// Reconciles the program of the `local_service` hook, which is attached only while a protected address is local to the
    /// node.
    pub fn restore_local_service(&mut self, is_local: bool) -> Result<Vec<CgroupChange>, DatapathError> {
        self.cgroups.is_local = Some(is_local);
        let recorded = self.cgroups.record(&mut self.maps);
        let changes = self.restore_local_service_hook()?;
        recorded.map(|()| changes)
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
        let pins = self.pin_lock.dir();
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
