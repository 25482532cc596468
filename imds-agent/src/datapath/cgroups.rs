//! The hooks of cgroups: `socket` and `host_network`.

use std::{collections::BTreeSet, path::PathBuf};

use imds_ebpf_common::{CgroupRecord, Hook, cgroup::SENDMSG_OFF, names::MAP_CGROUP};

use super::{
    Datapath, DatapathError, Plan,
    cgroup_link::{CgroupChange, CgroupChangeKind},
    hosts::{self, Hosts},
    object::{self, Maps},
    pins::PinDir,
    sendmsg::{SendmsgInputs, SendmsgReason, sendmsg_reason},
    sockets::{self, SOCKETS, Sockets},
};
use crate::config::{Hooks, Sendmsg};

/// The programs on cgroups, and what decides which of them run.
#[derive(Debug)]
pub(super) struct Cgroups {
    sockets: Option<Sockets>,
    hosts: Hosts,
    setting: Sendmsg,
    hooks: Hooks,
    has_tc_cookie: bool,
    is_enforced: bool,
    sendmsg: Option<SendmsgReason>,
    /// The record as it was written last.
    recorded: Option<CgroupRecord>,
}

impl Cgroups {
    /// Opens what earlier agents pinned for the cgroup of `plan`.
    pub(super) fn adopt(pins: &PinDir, plan: &Plan) -> Result<Self, DatapathError> {
        let mut cgroups = Self {
            sockets: None,
            hosts: Hosts::default(),
            setting: plan.sendmsg,
            hooks: plan.hooks,
            has_tc_cookie: object::tc_has_cookie(),
            is_enforced: true,
            sendmsg: None,
            recorded: None,
        };
        cgroups.sendmsg = cgroups.sendmsg_reason();
        cgroups.adopt_missing(pins, plan)?;
        Ok(cgroups)
    }

    fn adopt_missing(&mut self, pins: &PinDir, plan: &Plan) -> Result<(), DatapathError> {
        if let (None, Some(cgroup)) = (&self.sockets, &plan.cgroup) {
            self.sockets = Some(Sockets::adopt(pins, cgroup, SOCKETS)?);
        }
        Ok(())
    }

    /// Adds the programs that `plan` needs to those that are needed now.
    pub(super) fn prepare(&mut self, pins: &PinDir, plan: &Plan) -> Result<(), DatapathError> {
        (self.setting, self.hooks) = (plan.sendmsg, plan.hooks);
        self.sendmsg = self.sendmsg_reason().or(self.sendmsg);
        self.adopt_missing(pins, plan)
    }

    /// Reports whether the programs are those that `plan` needs, and no more.
    pub(super) fn matches(&self, plan: &Plan) -> bool {
        self.setting == plan.sendmsg && self.sendmsg == self.sendmsg_reason()
    }

    /// Drops the programs that `plan` does not need: they are to be detached from now on.
    pub(super) fn release(&mut self, plan: &Plan) {
        (self.setting, self.hooks) = (plan.sendmsg, plan.hooks);
        self.sendmsg = self.sendmsg_reason();
        if !plan.hooks.has(Hook::Socket) {
            self.sockets = None;
        }
        if !plan.hooks.has(Hook::HostNetwork) {
            self.hosts = Hosts::default();
        }
    }

    fn sendmsg_reason(&self) -> Option<SendmsgReason> {
        let Self { setting, hooks, has_tc_cookie, is_enforced, .. } = *self;
        sendmsg_reason(SendmsgInputs { setting, hooks, has_tc_cookie, is_enforced })
    }

    /// Writes the desired state for `status`, if it has changed.
    fn record(&mut self, maps: &mut Maps) -> Result<(), DatapathError> {
        let record = CgroupRecord {
            cgroup: self.sockets.as_ref().map_or(0, Sockets::id),
            sendmsg: match (self.sendmsg, self.setting) {
                (Some(reason), _) => reason as u32,
                (None, Sendmsg::Off) => SENDMSG_OFF,
                (None, Sendmsg::Auto | Sendmsg::On) => 0,
            },
            local_service: 0,
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
    /// Programs that are not attached to their cgroup, or not last there, in words.
    pub fn cgroup_failures(&self) -> impl Iterator<Item = &str> {
        self.cgroups.sockets.iter().flat_map(Sockets::failures).chain(self.cgroups.hosts.failures())
    }

    /// Attaches, replaces, moves, pins or detaches the programs of the `socket` hook as needed. A program that cannot be
    /// attached is a change of kind [`CgroupChangeKind::Failed`], reported once; the next call tries again.
    pub fn restore_sockets(&mut self) -> Result<Vec<CgroupChange>, DatapathError> {
        // Programs are attached even if the record cannot be written.
        let recorded = self.cgroups.record(&mut self.maps);
        let needs_sendmsg = self.cgroups.sendmsg.is_some();
        if let Some(sockets) = &mut self.cgroups.sockets {
            let is_desired = |attach_type| needs_sendmsg || !sockets::is_sendmsg(attach_type);
            let changes = sockets.restore(&self.programs, is_desired)?;
            return recorded.map(|()| changes);
        }
        let detached = sockets::detach_all(self.claim.dir())?;
        let change =
            || CgroupChange::new(CgroupChangeKind::Detached, "detached the programs of the socket hook");
        Ok(detached.then(change).into_iter().collect())
    }

    /// Attaches or detaches the sendmsg programs as needed, given whether every interface has its programs.
    pub fn set_enforced(&mut self, is_enforced: bool) -> Result<Vec<CgroupChange>, DatapathError> {
        self.cgroups.is_enforced = is_enforced;
        let reason = self.cgroups.sendmsg_reason();
        if self.cgroups.sendmsg == reason {
            return Ok(Vec::new());
        }
        self.cgroups.sendmsg = reason;
        self.restore_sockets()
    }

    /// Restores the programs of the `host_network` hook on the cgroups of Kubernetes pods, which are at these paths. Links
    /// on other cgroups are removed if these are `all` that exist.
    pub fn restore_hosts(
        &mut self,
        cgroups: &BTreeSet<PathBuf>,
        all: bool,
    ) -> Result<Vec<CgroupChange>, DatapathError> {
        let pins = self.claim.dir();
        if !self.hooks.has(Hook::HostNetwork) {
            let detached = hosts::detach_all(pins)?;
            let text = "detached the programs of the host_network hook";
            let change = || CgroupChange::new(CgroupChangeKind::Detached, text);
            return Ok(detached.then(change).into_iter().collect());
        }
        let mut changes = self.cgroups.hosts.restore(pins, &self.programs, cgroups)?;
        if all {
            changes.extend(self.cgroups.hosts.forget_others(pins)?);
        }
        Ok(changes)
    }
}
