//! Adds the cgroup hooks to the status report.

use std::collections::{BTreeMap, BTreeSet};

use imds_ebpf_common::{
    CgroupRecord, CounterKey, Hook,
    cgroup::SENDMSG_OFF,
    names::{MAP_CGROUP, MAP_NODE_ALLOW, PROG_LOCAL_SERVICE},
};
use toml::Value;

use super::{
    HostNetworkReport, LocalServiceReport, NodeAllowEntry, NodeAllowReport, PartReport, SocketReport,
    StatusReport, effective_table, unreadable,
};
use crate::{
    config::Hooks,
    datapath::{
        DatapathError,
        attach::{
            cgroup_hooks::{NO_CGROUP, NO_CGROUP_FOR_NODE, NO_CGROUP_FOR_NODE_REMEDY, NO_CGROUP_REMEDY},
            cgroup_programs::{self, LOCAL_SERVICE, NODE_ALLOW, ProgramState, SOCKETS},
            host_cgroups,
            netns_identity::{no_cookie, no_cookie_remedy},
            sendmsg::SendmsgReason,
        },
        maps::{counters::Counts, node_allow_map},
        object::{self, Maps},
        pin::dir::PinDir,
    },
    node::{cgroup, kubepods, netns},
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
        let record = maps.cgroup.get(&0, 0).map_err(unreadable(MAP_CGROUP))?;
        if hooks.contains(Hook::Socket) {
            let has_redirects = object::present(maps.redirects.keys()).next().is_some();
            self.add_sockets(pins, &record, has_redirects, take(Hook::Socket));
        }
        if hooks.contains(Hook::LocalService) {
            self.add_local_service(pins, &record, take(Hook::LocalService));
        }
        if hooks.contains(Hook::HostNetwork) {
            self.add_host_network(host_cgroups::inspect(pins)?, take(Hook::HostNetwork));
        }
        if hooks.contains(Hook::NodeAllow) {
            self.add_node_allow(pins, maps, &record, take(Hook::NodeAllow))?;
        }
        Ok(())
    }

    /// Adds the `socket` hook: its programs on the cgroup that the agent recorded.
    fn add_sockets(&mut self, pins: &PinDir, record: &CgroupRecord, has_redirects: bool, counts: Counts) {
        self.total += counts;
        let reason = SendmsgReason::from_repr(record.sendmsg);
        let cgroup = if record.cgroup == 0 { cgroup::root_id() } else { Some(record.cgroup) };
        let mut programs = cgroup.map(|id| cgroup_programs::inspect(pins, SOCKETS, id)).unwrap_or_default();
        if programs.is_empty() && !lacks_cookie() {
            self.problem(None, NO_CGROUP, NO_CGROUP_REMEDY);
        }
        let mut sendmsg = programs.iter().filter(|program| program.is_sendmsg);
        let has_sendmsg = !programs.is_empty() && sendmsg.all(|program| program.is_attached);
        programs.retain(|program| {
            (reason.is_some() || !program.is_sendmsg) && (has_redirects || !program.is_peer)
        });
        self.add_programs(Hook::Socket, &programs);
        let text = match (reason, record.sendmsg) {
            (Some(reason), _) => Some(reason.into()),
            (None, 0) => Some("from_pod and node_egress cover pods whose packets the node forwards"),
            (None, SENDMSG_OFF) => Some("hooks.sendmsg is false"),
            (None, _) => None,
        };
        self.sockets = Some(SocketReport {
            attached: !programs.is_empty()
                && programs.iter().all(|program| program.is_attached || program.is_peer),
            programs,
            sendmsg: PartReport { attached: has_sendmsg, reason: text },
            counts,
        });
    }

    /// Adds the `local_service` hook: its program on the cgroup that the agent recorded.
    fn add_local_service(&mut self, pins: &PinDir, record: &CgroupRecord, counts: Counts) {
        self.total += counts;
        let desired = record.local_service == 1;
        let has_cgroup = record.cgroup != 0;
        let program =
            has_cgroup.then(|| cgroup_programs::inspect(pins, LOCAL_SERVICE, record.cgroup).pop()).flatten();
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
    }

    /// Adds the `host_network` hook: its programs on the cgroups of Kubernetes pods.
    fn add_host_network(&mut self, cgroups: BTreeMap<u64, Vec<ProgramState>>, counts: Counts) {
        self.total += counts;
        let (cgroups, programs): (Vec<_>, Vec<_>) = cgroups.into_iter().unzip();
        let programs = programs.concat();
        self.add_programs(Hook::HostNetwork, &programs);
        if cgroups.is_empty() && !lacks_cookie() {
            let problem =
                "hostNetwork pods are not restricted: no cgroup of Kubernetes pods (kubepods) was found";
            self.problem(None, problem, kubepods::missing_kubepods_hint());
        }
        let attached = are_attached(&programs);
        self.host_network = Some(HostNetworkReport { attached, cgroups, programs, counts });
    }

    /// Adds the `node_allow` hook: its programs on the cgroup that the agent recorded, and the allow list.
    fn add_node_allow(
        &mut self,
        pins: &PinDir,
        maps: &Maps,
        record: &CgroupRecord,
        counts: Counts,
    ) -> Result<(), DatapathError> {
        self.total += counts;
        let cgroup = if record.cgroup == 0 { cgroup::root_id() } else { Some(record.cgroup) };
        let mut programs =
            cgroup.map(|id| cgroup_programs::inspect(pins, NODE_ALLOW, id)).unwrap_or_default();
        if programs.is_empty() && !lacks_cookie() {
            self.problem(None, NO_CGROUP_FOR_NODE, NO_CGROUP_FOR_NODE_REMEDY);
        }
        let has_packets = object::cgroup_has_cookie();
        let mut packets = programs.iter().filter(|program| program.is_packet_program);
        let checks_packets = !programs.is_empty() && packets.all(|program| program.is_attached);
        programs.retain(|program| has_packets || !program.is_packet_program);
        self.add_programs(Hook::NodeAllow, &programs);
        let reason =
            "this kernel does not report the network namespace of packets at cgroups (needs Linux 6.15)";
        let active: BTreeSet<u32> =
            node_allow_map::read(maps).map_err(unreadable(MAP_NODE_ALLOW))?.into_values().collect();
        let entries = node_allow_entries(maps)?.into_iter().zip(1..);
        let allow =
            entries.map(|(process, number)| NodeAllowEntry { process, active: active.contains(&number) });
        self.node_allow = Some(NodeAllowReport {
            attached: are_attached(&programs),
            programs,
            packets: PartReport { attached: checks_packets, reason: (!has_packets).then_some(reason) },
            cgroup,
            allow: allow.collect(),
            counts,
        });
        Ok(())
    }

    /// Adds the problems of the programs of a hook whose programs compare network namespaces.
    fn add_programs(&mut self, hook: Hook, programs: &[ProgramState]) {
        if lacks_cookie() {
            self.problem(None, no_cookie(hook, are_attached(programs)), no_cookie_remedy(hook));
            return;
        }
        for program in programs {
            self.add_program(program);
        }
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

/// Reports whether the programs cannot identify this network namespace: before Linux 5.14, outside the initial one.
fn lacks_cookie() -> bool {
    matches!(netns::identity(), Ok(None))
}

fn are_attached(programs: &[ProgramState]) -> bool {
    !programs.is_empty() && programs.iter().all(|program| program.is_attached)
}

/// Returns the allow list of the effective configuration, in the order of the file.
pub(crate) fn node_allow_entries(maps: &Maps) -> Result<Vec<String>, DatapathError> {
    let table = effective_table(maps)?;
    let allow = table.get("node").and_then(|node| node.get("allow")).and_then(Value::as_array);
    Ok(allow.into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect())
}
