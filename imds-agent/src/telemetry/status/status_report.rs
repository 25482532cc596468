//! Status report, serialized as JSON for `-o json`.

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf};

use imds_ebpf_common::{Hook, Mode};
use jiff::Timestamp;
use serde::Serialize;
use strum::Display;

use crate::{
    datapath::{attach::attachment::Order, maps::counters::Counts},
    kube::pod_ref::{PodRef, PodWatchStatus},
};

/// Status of the node on one pin directory.
#[derive(Debug, Default, Serialize)]
pub struct StatusReport {
    /// Schema version. Removed and changed fields increase it.
    pub schema: u32,
    /// Version of the program that made the report.
    pub version: &'static str,
    /// Directory of the pinned maps, programs and links.
    pub pin_dir: PathBuf,
    /// State of the node in one word.
    pub state: State,
    /// Agent that uses this pin directory.
    pub agent: Agent,
    /// Effective configuration; `None` if nothing is loaded.
    pub configuration: Option<Configuration>,
    /// Effective mode; `None` if nothing is loaded.
    pub mode: Option<&'static str>,
    /// Reply to denied packets, `drop` or `reject`; `None` if nothing is loaded.
    pub on_deny: Option<&'static str>,
    /// Provider of the endpoints; `None` if nothing is loaded.
    pub provider: Option<Provider>,
    /// Protected endpoints, in the order of the configuration.
    pub endpoints: Vec<Endpoint>,
    /// Exempt senders, sorted by rule.
    pub exemptions: Vec<ExemptSender>,
    /// Status of the pod watch; `None` if no pods are watched.
    pub kubernetes: Option<PodWatchStatus>,
    /// All interfaces of the node.
    pub interfaces: Vec<Interface>,
    /// Names of the enabled hooks.
    pub hooks: Vec<&'static str>,
    /// Programs of these hooks that the kernel rejected.
    pub rejected_programs: Vec<RejectedProgram>,
    /// The `socket` hook; `None` if the hook is off.
    pub sockets: Option<SocketReport>,
    /// The `host_network` hook, which restricts pods in the node's network namespace; `None` if the hook is off.
    pub host_network: Option<HostNetworkReport>,
    /// The `local_service` hook, for a metadata service on the node; `None` if the hook is off.
    pub local_service: Option<LocalServiceReport>,
    /// Allow list of the node; `None` if the configuration has none.
    pub node_allow: Option<NodeAllowReport>,
    /// Counts of interfaces that were deleted.
    pub deleted: Counts,
    /// Counts of all interfaces and hooks, deleted interfaces included.
    pub total: Counts,
    /// Counts by hook, over all interfaces. Hooks without counts are left out.
    pub by_hook: BTreeMap<&'static str, Counts>,
    /// Number of rate-limited packets and calls that no event accounts for yet.
    pub pending_events: u64,
    /// Problems of this node. If there are any, the state is [`State::Degraded`].
    pub problems: Vec<Problem>,
}

impl StatusReport {
    /// Describes each interface and hook that is not enforced, one line each. Empty if all enabled hooks are enforced.
    pub fn not_enforced(&self) -> Vec<String> {
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
pub struct RejectedProgram {
    /// Name of the program, as `bpftool` shows it.
    pub program: &'static str,
    /// Name of the hook that lacks it.
    pub hook: &'static str,
    /// Error of bpf(2) as text, without the verifier's log.
    pub error: String,
    /// The program of an earlier agent runs in its place.
    pub has_earlier: bool,
}

/// State of the node in one word.
#[derive(Clone, Copy, Debug, Default, Display, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
#[strum(serialize_all = "lowercase")]
pub enum State {
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

/// Agent that uses the pin directory.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Agent {
    /// True if an agent runs.
    pub running: bool,
    /// True if the agent has reconciled every interface since it started.
    pub ready: bool,
    /// Pid of the agent, if it is visible in this pid namespace.
    pub pid: Option<i32>,
}

/// Configuration that the kernel enforces now.
#[derive(Clone, Debug, Serialize)]
pub struct Configuration {
    /// Generation, which each load of a configuration increases by 1, also across restarts of the agent.
    pub generation: u64,
    /// Configuration file; `None` if all keys have their defaults.
    pub file: Option<PathBuf>,
    /// Time at which the configuration became effective.
    pub loaded_at: Timestamp,
    /// Last rejected configuration, if it is newer than this one.
    pub rejected: Option<RejectedConfigReport>,
}

/// A configuration that the agent rejected.
#[derive(Clone, Debug, Serialize)]
pub struct RejectedConfigReport {
    /// Time of the rejection.
    pub at: Timestamp,
    /// Reason of the rejection.
    pub error: String,
}

/// Cloud provider whose endpoints are protected.
#[derive(Clone, Debug, Serialize)]
pub struct Provider {
    /// Provider in the configuration: `auto`, `none` or a name.
    pub configured: String,
    /// Provider whose endpoints are protected.
    pub effective: String,
}

/// A protected address with its allowed ports.
#[derive(Clone, Debug, Serialize)]
pub struct Endpoint {
    /// Name of the endpoint, as in the configuration.
    pub name: String,
    /// Protected IPv4 or IPv6 address.
    pub address: IpAddr,
    /// Ports that every pod may reach, such as `udp/53`.
    pub allow_ports: Vec<String>,
}

/// An exempt sender, identified by one of interface, network namespace and cgroup.
#[derive(Clone, Debug, Serialize)]
pub struct ExemptSender {
    /// Name of the rule; its number if the rule is no longer in the configuration.
    pub rule: String,
    /// Name of the interface; its index if it was deleted.
    pub interface: Option<String>,
    /// Cookie of the network namespace.
    pub netns_cookie: Option<u64>,
    /// Id of the cgroup v2.
    pub cgroup: Option<u64>,
    /// Pod of the sender, if it is known.
    pub pod: Option<PodRef>,
    /// Name of the endpoint, or its address if it is not protected; `None` for all endpoints.
    pub endpoint: Option<String>,
    /// Verdict on the sender's requests: `exempt`, or `audited` for a rule with `audit = true`.
    pub verdict: &'static str,
}

/// One interface of the node.
#[derive(Debug, Serialize)]
pub struct Interface {
    /// Index of the interface (ifindex).
    pub ifindex: u32,
    /// Name of the interface, escaped.
    pub name: String,
    /// Pod of the interface, if it is known.
    pub pod: Option<PodRef>,
    /// Role of the interface on the node.
    pub role: &'static str,
    /// Attachments that the interface should have, for the enabled hooks.
    pub attachments: Vec<HookAttachment>,
    /// Packets and bytes by verdict.
    #[serde(flatten)]
    pub counts: Counts,
}

/// A TC hook that an interface should have, and the program there.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct HookAttachment {
    /// Name of the hook, `from_pod` or `node_egress`.
    pub hook: &'static str,
    /// Attach mode of the agent's program: `tcx`, `clsact` or `netkit`; `None` if there is none.
    pub attach_mode: Option<&'static str>,
    /// Order among the programs of the hook: `first`, `not_first` or `blocked`; `None` if there is no program.
    pub order: Option<&'static str>,
    /// True while the attachment waits in the agent's attach queue.
    pub pending: bool,
}

impl HookAttachment {
    /// Reports whether the agent's program is attached.
    pub fn is_attached(&self) -> bool {
        self.attach_mode.is_some()
    }

    /// Reports whether the agent's program is attached and runs before all others.
    pub fn is_enforced(&self) -> bool {
        self.order == Some(Order::First.into())
    }
}

impl Interface {
    /// Reports whether each desired program is attached.
    pub fn is_attached(&self) -> bool {
        self.attachments.iter().all(HookAttachment::is_attached)
    }

    /// Returns the attachment at the hook with this name, if the interface should have one.
    pub fn attachment(&self, hook: &str) -> Option<&HookAttachment> {
        self.attachments.iter().find(|attachment| attachment.hook == hook)
    }
}

/// A program that a cgroup should have.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
pub struct CgroupProgram {
    /// Name of the BPF program.
    pub program: &'static str,
    /// Id of the cgroup: its inode number.
    pub cgroup: u64,
    /// True if the program is attached to the cgroup.
    pub attached: bool,
}

/// State of the `socket` hook.
#[derive(Debug, Serialize)]
pub struct SocketReport {
    /// True if all needed programs are attached.
    pub attached: bool,
    /// Needed programs.
    pub programs: Vec<CgroupProgram>,
    /// State of the programs for unconnected UDP sockets.
    pub sendmsg: PartReport,
    /// Number of calls by verdict; bytes are not counted.
    #[serde(flatten)]
    pub counts: Counts,
}

/// State of those programs of a hook that are not always attached.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct PartReport {
    /// True if all of them are attached.
    pub attached: bool,
    /// Reason why they are needed, or why not.
    pub reason: Option<&'static str>,
}

/// State of the `local_service` hook, for a metadata service on the node.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct LocalServiceReport {
    /// True if the program is attached.
    pub attached: bool,
    /// True if a protected address is local to the node, so that the program is needed.
    pub desired: bool,
    /// Packets for sockets of the node, by verdict.
    #[serde(flatten)]
    pub counts: Counts,
}

/// Allow list of the node, and state of the hook that enforces it.
#[derive(Debug, Serialize)]
pub struct NodeAllowReport {
    /// True if all programs that the kernel supports are attached.
    pub attached: bool,
    /// Programs that the kernel supports.
    pub programs: Vec<CgroupProgram>,
    /// State of the program for packets. The reason says why the kernel does not support it.
    pub packets: PartReport,
    /// Id of the cgroup to which the programs are attached; `None` if no cgroup v2 hierarchy is mounted.
    pub cgroup: Option<u64>,
    /// Entries of the allow list.
    pub allow: Vec<NodeAllowEntry>,
    /// Counters of the hook: calls, which have no bytes, and packets.
    #[serde(flatten)]
    pub counts: Counts,
}

/// Entry of the allow list of the node.
#[derive(Clone, Debug, Serialize)]
pub struct NodeAllowEntry {
    /// Entry in the spelling of the configuration, such as `uid:0`.
    pub process: String,
    /// True if the programs use the entry; false for a cgroup that does not exist.
    pub active: bool,
}

/// State of the `host_network` hook.
#[derive(Debug, Serialize)]
pub struct HostNetworkReport {
    /// True if a cgroup of Kubernetes pods exists, and all programs are attached to each.
    pub attached: bool,
    /// Ids of these cgroups: their inode numbers.
    pub cgroups: Vec<u64>,
    /// Programs of each of these cgroups.
    pub programs: Vec<CgroupProgram>,
    /// Calls and packets by verdict. Bytes of calls are not counted.
    #[serde(flatten)]
    pub counts: Counts,
}

/// A problem of this node, with its remedy.
#[derive(Debug, Serialize)]
pub struct Problem {
    /// Name of the affected interface; `None` if the problem affects the whole node.
    pub interface: Option<String>,
    /// Description of the problem in one sentence.
    pub problem: String,
    /// Action that fixes it, or command that shows more.
    pub remedy: String,
}
