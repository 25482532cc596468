//! Status report, serialized as JSON for `-o json`. docs/json.md describes the fields.

use std::{collections::BTreeMap, path::PathBuf};

use imds_ebpf_common::{Hook, Mode};
use serde::Serialize;
use strum::Display;

use crate::{
    config::endpoint_set::Endpoint,
    datapath::{
        attach::{attachment::Order, cgroup_programs::ProgramState},
        maps::{config_record::EffectiveConfig, counters::Counts},
    },
    kube::pod_ref::{PodRef, PodWatchStatus},
};

#[derive(Debug, Default, Serialize)]
pub(crate) struct StatusReport {
    pub schema: u32,
    pub version: &'static str,
    pub pin_dir: PathBuf,
    pub state: State,
    pub agent: Agent,
    pub configuration: Option<EffectiveConfig>,
    pub mode: Option<&'static str>,
    pub on_deny: Option<&'static str>,
    pub explained: Option<ExplainedReport>,
    pub provider: Option<Provider>,
    pub endpoints: Vec<Endpoint>,
    pub exemptions: Vec<ExemptSender>,
    pub kubernetes: Option<PodWatchStatus>,
    pub interfaces: Vec<Interface>,
    pub hooks: Vec<&'static str>,
    pub rejected_programs: Vec<RejectedProgram>,
    pub sockets: Option<SocketReport>,
    pub host_network: Option<HostNetworkReport>,
    pub local_service: Option<LocalServiceReport>,
    pub node_allow: Option<NodeAllowReport>,
    pub deleted: Counts,
    pub total: Counts,
    pub by_hook: BTreeMap<&'static str, Counts>,
    pub pending_events: u64,
    pub sinks: Vec<SinkStatus>,
    pub problems: Vec<Problem>,
}

impl StatusReport {
    /// Describes each interface and hook that is not enforced, one line each. Empty if all enabled hooks are enforced.
    pub(crate) fn not_enforced(&self) -> Vec<String> {
        if self.state == State::Unloaded {
            return vec!["nothing is loaded".to_owned()];
        }
        if self.mode.is_none() {
            return self.problems.iter().map(|problem| problem.problem.clone()).collect();
        }
        let mut not_enforced = Vec::new();
        if !self.agent.ready {
            not_enforced.push("the agent has not reconciled all interfaces yet".to_owned());
        }
        let rejected = self.rejected_programs.iter().filter(|rejected| !rejected.has_earlier);
        not_enforced.extend(rejected.map(|rejected| {
            format!("{} is not enforced: {} is not loaded", rejected.hook, rejected.program)
        }));
        let is_node_wide =
            self.hooks.iter().any(|&hook| hook == Hook::NodeEgress.name() || hook == Hook::Socket.name());
        for Interface { name, attachments, .. } in &self.interfaces {
            let missing = attachments.iter().filter(|attachment| !attachment.is_attached());
            let missing = missing.filter(|attachment| !attachment.pending || !is_node_wide);
            not_enforced.extend(
                missing.map(|attachment| format!("interface {name}: {} is not enforced", attachment.hook)),
            );
        }
        if self.lacks_attach_points() {
            not_enforced.push(NOT_ATTACHED.to_owned());
        }
        if self.sockets.as_ref().is_some_and(|sockets| !sockets.attached) {
            not_enforced.push("socket is not attached".to_owned());
        }
        if self.local_service.as_ref().is_some_and(|local| local.desired && !local.attached) {
            not_enforced.push("local_service is not attached".to_owned());
        }
        if self.host_network.as_ref().is_some_and(|hosts| !hosts.attached) {
            not_enforced.push("hostNetwork pods are not restricted".to_owned());
        }
        if self.node_allow.as_ref().is_some_and(|node| !node.attached) {
            not_enforced.push("node_allow is not attached".to_owned());
        }
        not_enforced
    }

    /// Describes everything that may let requests of pods pass, one line each: [`StatusReport::not_enforced`], and problems such as a program
    /// of another agent that runs before the hook. Problems of exemptions and of a rejected configuration are left out.
    pub(crate) fn gaps(&self) -> Vec<String> {
        let mut gaps = self.not_enforced();
        for Problem { interface, problem, .. } in self.problems.iter().filter(|problem| problem.is_gap) {
            let gap = interface.as_ref().map(|name| format!("interface {name}: {problem}"));
            let gap = gap.unwrap_or_else(|| problem.clone());
            if !gaps.contains(&gap) {
                gaps.push(gap);
            }
        }
        gaps
    }

    /// Reports whether no interface and no cgroup should have an enabled hook, for example because all interfaces are excluded.
    /// `from_pod` without `node_egress` can wait for the first pod.
    pub(super) fn lacks_attach_points(&self) -> bool {
        let has = |hook: Hook| self.hooks.contains(&hook.name());
        self.mode != Some(Mode::Off.name())
            && (has(Hook::NodeEgress) || !has(Hook::FromPod))
            && self.interfaces.iter().all(|interface| interface.attachments.is_empty())
            && !(has(Hook::Socket) || has(Hook::HostNetwork) || has(Hook::NodeAllow))
            && self.local_service.is_none_or(|local| !local.desired)
    }
}

/// Problem of a node without an interface or cgroup for the enabled hooks.
pub(super) const NOT_ATTACHED: &str = "no enabled hook is attached to anything: no request is denied";

/// A program that the kernel rejected when the agent loaded it.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct RejectedProgram {
    pub program: &'static str,
    pub hook: &'static str,
    pub error: String,
    pub has_earlier: bool,
}

#[derive(Clone, Copy, Debug, Default, Display, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
#[strum(serialize_all = "lowercase")]
pub(crate) enum State {
    /// Mode `enforce` without problems: requests of pods are denied.
    Enforcing,
    /// Mode `audit` without problems: requests of pods are counted and pass.
    Auditing,
    /// Mode `off` without problems: requests of pods pass.
    Off,
    /// The report lists at least one problem.
    Degraded,
    /// The pin directory has no programs and maps.
    #[default]
    Unloaded,
}

#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct Agent {
    pub running: bool,
    pub ready: bool,
    pub pid: Option<i32>,
}

/// Pods whose denials are explained, and the reason why others get no explanation.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct ExplainedReport {
    pub pods: usize,
    pub reason: Option<&'static str>,
}

#[derive(Clone, Debug, Serialize)]
pub(crate) struct Provider {
    pub configured: String,
    pub effective: String,
}

/// An exempt sender, identified by one of interface, network namespace and cgroup.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct ExemptSender {
    pub rule: String,
    pub interface: Option<String>,
    pub netns_cookie: Option<u64>,
    pub cgroup: Option<u64>,
    pub pod: Option<PodRef>,
    pub endpoint: Option<String>,
    pub verdict: &'static str,
    /// Requests that the rule allows, as in the configuration; `None` for an exemption from enforcement.
    pub allow: Option<Vec<String>>,
    /// Number of other rules whose requests are allowed too.
    pub other_rules: u32,
}

#[derive(Debug, Serialize)]
pub(crate) struct Interface {
    pub ifindex: u32,
    pub name: String,
    pub pod: Option<PodRef>,
    pub role: &'static str,
    pub attachments: Vec<HookAttachment>,
    #[serde(flatten)]
    pub counts: Counts,
}

/// A TC hook that an interface should have, and the program there.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct HookAttachment {
    pub hook: &'static str,
    pub attach_mode: Option<&'static str>,
    pub order: Option<&'static str>,
    pub pending: bool,
}

impl HookAttachment {
    pub(crate) fn is_attached(&self) -> bool {
        self.attach_mode.is_some()
    }

    /// Reports whether the agent's program is attached and runs before all others.
    pub(crate) fn is_enforced(&self) -> bool {
        self.order == Some(Order::First.into())
    }
}

impl Interface {
    pub(crate) fn is_attached(&self) -> bool {
        self.attachments.iter().all(HookAttachment::is_attached)
    }

    /// Returns the attachment at the hook with this name, if the interface should have one.
    pub(crate) fn attachment(&self, hook: &str) -> Option<&HookAttachment> {
        self.attachments.iter().find(|attachment| attachment.hook == hook)
    }
}

#[derive(Debug, Serialize)]
pub(crate) struct SocketReport {
    pub attached: bool,
    pub programs: Vec<ProgramState>,
    pub sendmsg: PartReport,
    #[serde(flatten)]
    pub counts: Counts,
}

/// State of those programs of a hook that are not always attached.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct PartReport {
    pub attached: bool,
    pub reason: Option<&'static str>,
}

/// State of the `local_service` hook, for a metadata service on the node.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct LocalServiceReport {
    pub attached: bool,
    pub desired: bool,
    #[serde(flatten)]
    pub counts: Counts,
}

/// Allow list of the node, and state of the hook that enforces it.
#[derive(Debug, Serialize)]
pub(crate) struct NodeAllowReport {
    pub attached: bool,
    pub programs: Vec<ProgramState>,
    pub packets: PartReport,
    pub cgroup: Option<u64>,
    pub allow: Vec<NodeAllowEntry>,
    #[serde(flatten)]
    pub counts: Counts,
}

#[derive(Clone, Debug, Serialize)]
pub(crate) struct NodeAllowEntry {
    pub process: String,
    pub active: bool,
}

#[derive(Debug, Serialize)]
pub(crate) struct HostNetworkReport {
    pub attached: bool,
    pub cgroups: Vec<u64>,
    pub programs: Vec<ProgramState>,
    #[serde(flatten)]
    pub counts: Counts,
}

/// A configured sink of denial records, and why it fails.
#[derive(Debug, Serialize)]
pub(crate) struct SinkStatus {
    pub sink: String,
    pub error: Option<String>,
}

#[derive(Debug, Serialize)]
#[expect(clippy::struct_field_names, reason = "the name in the JSON form")]
pub(crate) struct Problem {
    pub interface: Option<String>,
    pub problem: String,
    pub remedy: String,
    /// True if the problem may let requests of pods pass that the configuration denies.
    #[serde(skip)]
    pub is_gap: bool,
}
