//! Adds the cgroup hooks to the status report.

use std::{collections::BTreeMap, os::unix::fs::MetadataExt as _};

use imds_ebpf_common::{CounterKey, Hook, cgroup::SENDMSG_OFF, names::PROG_LOCAL_SERVICE};

use super::{HostReport, LocalServiceReport, SendmsgReport, SocketReport, StatusReport, unreadable};
use crate::{
    config::Hooks,
    datapath::{
        DatapathError,
        attach::{
            cgroup_hooks::{NO_CGROUP, NO_CGROUP_REMEDY},
            cgroup_programs::{self, ProgramState},
            host_cgroups,
            sendmsg::SendmsgReason,
        },
        maps::counters::Counts,
        object::Maps,
        pin::dir::PinDir,
    },
    node::{cgroup, kubepods},
};

impl StatusReport {
    /// Adds the enabled cgroup hooks, and removes their counts from `counts`.
    pub(crate) fn add_cgroups(
        &mut self,
        pins: &PinDir,
        maps: &Maps,
        hooks: Hooks,
        counts: &mut BTreeMap<(u32, u8), Counts>,
    ) -> Result<(), DatapathError> {
        let mut take = |hook: Hook| counts.remove(&(CounterKey::DELETED, hook as u8)).unwrap_or_default();
        if hooks.has(Hook::Socket) {
            self.add_sockets(pins, maps, take(Hook::Socket))?;
        }
        if hooks.has(Hook::LocalService) {
            self.add_local_service(pins, maps, take(Hook::LocalService))?;
        }
        if hooks.has(Hook::HostNetwork) {
            self.add_hosts(host_cgroups::inspect(pins)?, take(Hook::HostNetwork));
        }
        Ok(())
    }

    /// Adds the `socket` hook: its programs on the cgroup that the agent recorded.
    fn add_sockets(&mut self, pins: &PinDir, maps: &Maps, counts: Counts) -> Result<(), DatapathError> {
        self.total += counts;
        let record = maps.cgroup.get(&0, 0).map_err(unreadable)?;
        let reason = SendmsgReason::from_u32(record.sendmsg);
        let cgroup = if record.cgroup == 0 { root_id() } else { Some(record.cgroup) };
        let programs = cgroup.map(|id| cgroup_programs::inspect_sockets(pins, id)).unwrap_or_default();
        if programs.is_empty() {
            self.problem(None, NO_CGROUP, NO_CGROUP_REMEDY);
        }
        let is_desired = |program: &&ProgramState| reason.is_some() || !program.is_sendmsg;
        let desired: Vec<_> = programs.iter().filter(is_desired).collect();
        for program in &desired {
            self.add_program(program);
        }
        let mut sendmsg = programs.iter().filter(|program| program.is_sendmsg);
        let text = match (reason, record.sendmsg) {
            (Some(reason), _) => Some(reason.text()),
            (None, 0) => Some("from_pod and node_egress cover all pods"),
            (None, SENDMSG_OFF) => Some("hooks.sendmsg is false"),
            (None, _) => None,
        };
        self.sockets = Some(SocketReport {
            attached: !desired.is_empty() && desired.iter().all(|program| program.is_attached),
            sendmsg: SendmsgReport {
                attached: !programs.is_empty() && sendmsg.all(|program| program.is_attached),
                reason: text,
            },
            counts,
        });
        Ok(())
    }

    /// Adds the `local_service` hook: its program on the cgroup that the agent recorded.
    fn add_local_service(&mut self, pins: &PinDir, maps: &Maps, counts: Counts) -> Result<(), DatapathError> {
        self.total += counts;
        let record = maps.cgroup.get(&0, 0).map_err(unreadable)?;
        let desired = record.local_service == 1;
        let has_cgroup = record.cgroup != 0;
        let program =
            has_cgroup.then(|| cgroup_programs::inspect_local_service(pins, record.cgroup)).flatten();
        let attached = program.as_ref().is_some_and(|program| program.is_attached);
        match &program {
            Some(program) if desired => self.add_program(program),
            None if desired => {
                let problem = format!("{PROG_LOCAL_SERVICE} is not attached: the agent has no cgroup");
                self.problem(None, problem, "mount cgroup2, or set `run --cgroup`");
            }
            Some(_) | None => {}
        }
        self.local_service = Some(LocalServiceReport { attached, desired, counts });
        Ok(())
    }

    /// Adds the `host_network` hook: its programs on the cgroups of Kubernetes pods.
    fn add_hosts(&mut self, cgroups: BTreeMap<u64, Vec<ProgramState>>, counts: Counts) {
        self.total += counts;
        for program in cgroups.values().flatten() {
            self.add_program(program);
        }
        if cgroups.is_empty() {
            let problem =
                "hostNetwork pods are not restricted: no cgroup of Kubernetes pods (kubepods) was found";
            self.problem(None, problem, kubepods::missing_kubepods_hint());
        }
        let attached = !cgroups.is_empty() && cgroups.values().flatten().all(|program| program.is_attached);
        let cgroups = cgroups.into_keys().collect();
        self.host_network = Some(HostReport { attached, cgroups, counts });
    }

    fn add_program(&mut self, program: &ProgramState) {
        let Some(problem) = &program.problem else { return };
        let remedy = match (self.agent.running, program.is_attached) {
            (false, _) => "start `imds-agent run`",
            (true, true) => {
                "the agent moves it to the end; if this repeats, another program also moves to the end"
            }
            (true, false) => "the agent tries again at each resync; see its log for the cause",
        };
        self.problem(None, problem, remedy);
    }
}

/// Returns the id of the root of the cgroup v2 hierarchy.
fn root_id() -> Option<u64> {
    cgroup::root().ok()??.metadata().ok().map(|metadata| metadata.ino())
}
