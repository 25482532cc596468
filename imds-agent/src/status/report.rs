//! The report.

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf};

use imds_ebpf_common::Hook;
use jiff::Timestamp;
use serde::Serialize;

use crate::{
    datapath::counters::Counts,
    pods::{Identity, Lookup},
    reconcile::Order,
};

/// The whole of it.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Version of this form: within one, fields are only added.
    pub schema: u32,
    /// Version of the program that made the report.
    pub version: &'static str,
    /// The pin directory.
    pub pin_dir: PathBuf,
    /// In one word.
    pub state: State,
    /// The agent on this pin directory.
    pub agent: Agent,
    /// The configuration in force; `None` where nothing is loaded.
    pub configuration: Option<Configuration>,
    /// The mode in force; `None` where nothing is loaded.
    pub mode: Option<&'static str>,
    /// What senders of denied packets are told; `None` where nothing is loaded.
    pub on_deny: Option<&'static str>,
    /// Where the endpoints come from; `None` where nothing is loaded.
    pub provider: Option<Provider>,
    /// What is guarded.
    pub endpoints: Vec<Endpoint>,
    /// Who is exempt from what.
    pub exemptions: Vec<ExemptSender>,
    /// How pods of Kubernetes are looked up; `None` where they are not.
    pub kubernetes: Option<Lookup>,
    /// Every interface of the node.
    pub interfaces: Vec<Interface>,
    /// The hooks that are on.
    pub hooks: Vec<&'static str>,
    /// Calls on sockets; `None` where that hook is off.
    pub sockets: Option<SocketReport>,
    /// Pods in the node's network namespace; `None` where strict mode is off.
    pub host_network: Option<HostReport>,
    /// The hook for a metadata service on the node; `None` if that hook is off.
    pub local_service: Option<LocalServiceReport>,
    /// Counts of interfaces that are gone.
    pub departed: Counts,
    /// Counts of all, those that are gone too.
    pub total: Counts,
    /// Counts of each hook that has any, of whatever interface.
    pub by_hook: BTreeMap<&'static str, Counts>,
    /// Packets and calls of which no event told so far.
    pub untold: u64,
    /// What is not as it should be.
    pub problems: Vec<Problem>,
}

impl Report {
    /// What is to be guarded and is not, in words: interfaces, sockets and hostNetwork pods. Nothing where every hook that
    /// is on holds all that there is.
    #[must_use]
    pub fn uncovered(&self) -> Vec<String> {
        if self.state == State::Unloaded {
            return vec!["nothing is loaded".to_owned()];
        }
        let mut uncovered = Vec::new();
        if !self.agent.ready {
            uncovered.push("not every interface was looked at yet".to_owned());
        }
        let is_node_wide =
            self.hooks.iter().any(|&hook| hook == Hook::NodeEgress.name() || hook == Hook::Socket.name());
        for Interface { name, attachments, .. } in &self.interfaces {
            let missing = attachments.iter().filter(|attachment| !attachment.is_attached());
            let missing = missing.filter(|attachment| !attachment.pending || !is_node_wide);
            uncovered.extend(
                missing.map(|attachment| format!("interface {name}: {} is not enforced", attachment.hook)),
            );
        }
        if self.sockets.as_ref().is_some_and(|sockets| !sockets.attached) {
            uncovered.push("sockets are not guarded".to_owned());
        }
        if self.local_service.as_ref().is_some_and(|local| local.desired && !local.attached) {
            uncovered.push("local_service is not attached".to_owned());
        }
        if self.host_network.as_ref().is_some_and(|hosts| !hosts.attached) {
            uncovered.push("hostNetwork pods are not restricted".to_owned());
        }
        uncovered
    }
}

/// In one word.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Every pod is denied.
    Enforcing,
    /// Every pod is watched, none denied.
    Auditing,
    /// Every pod is let through, because the operator says so.
    Off,
    /// There are problems.
    Degraded,
    /// Nothing is loaded.
    Unloaded,
}

/// The agent on a pin directory.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Agent {
    /// Whether one runs.
    pub running: bool,
    /// Whether it has looked at every interface since it started.
    pub ready: bool,
    /// Its pid, where that can be seen from here.
    pub pid: Option<i32>,
}

/// The configuration in force.
#[derive(Clone, Debug, Serialize)]
pub struct Configuration {
    /// Its number: one more with each that comes into force, across agents.
    pub generation: u64,
    /// The file that it is from; `None` where all is default.
    pub file: Option<PathBuf>,
    /// When it came into force.
    pub loaded_at: Timestamp,
    /// A later one that was refused, if there was one.
    pub refused: Option<Refused>,
}

/// A configuration that was refused.
#[derive(Clone, Debug, Serialize)]
pub struct Refused {
    /// When.
    pub at: Timestamp,
    /// Why.
    pub error: String,
}

/// Where the endpoints come from.
#[derive(Clone, Debug, Serialize)]
pub struct Provider {
    /// What the configuration says: `auto`, `none` or a name.
    pub configured: String,
    /// Whose endpoints are guarded.
    pub in_force: String,
}

/// A guarded endpoint.
#[derive(Clone, Debug, Serialize)]
pub struct Endpoint {
    /// Its name.
    pub name: String,
    /// Its address.
    pub address: IpAddr,
    /// What pods may reach there all the same, such as `udp/53`.
    pub keep: Vec<String>,
}

/// A sender that is exempt, or audited where others are denied. It is known by one of interface, network namespace and
/// cgroup.
#[derive(Clone, Debug, Serialize)]
pub struct ExemptSender {
    /// Name of the rule that grants it; its number where that rule is no longer in the configuration.
    pub rule: String,
    /// Name of the interface, or its index where it is gone.
    pub interface: Option<String>,
    /// Cookie of the network namespace.
    pub netns_cookie: Option<u64>,
    /// Id of the cgroup v2.
    pub cgroup: Option<u64>,
    /// The pod behind it, where one is known.
    pub pod: Option<Identity>,
    /// Name of the endpoint, or its address where it is not guarded; `None` for all.
    pub endpoint: Option<String>,
    /// What becomes of what would be denied: `exempt` or `audit`.
    pub verdict: &'static str,
}

/// One interface of the node.
#[derive(Debug, Serialize)]
pub struct Interface {
    /// Interface index.
    pub ifindex: u32,
    /// Name.
    pub name: String,
    /// The pod behind it, where one is known.
    pub pod: Option<Identity>,
    /// Role of the interface on the node.
    pub role: &'static str,
    /// Attachments that it should have, of the hooks that are on.
    pub attachments: Vec<HookAttachment>,
    /// What was counted there.
    #[serde(flatten)]
    pub counts: Counts,
}

/// A TC hook that an interface should have, and the program there.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct HookAttachment {
    /// Name of the hook.
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
    #[must_use]
    pub fn is_attached(&self) -> bool {
        self.attach_mode.is_some()
    }

    /// Reports whether the agent's program is attached and runs before all others.
    #[must_use]
    pub fn is_enforced(&self) -> bool {
        self.order == Some(Order::First.name())
    }
}

impl Interface {
    /// Reports whether each desired program is attached.
    #[must_use]
    pub fn is_attached(&self) -> bool {
        self.attachments.iter().all(HookAttachment::is_attached)
    }

    /// The attachment at the hook with this name, if the interface should have one.
    #[must_use]
    pub fn attachment(&self, hook: &str) -> Option<&HookAttachment> {
        self.attachments.iter().find(|attachment| attachment.hook == hook)
    }
}

/// The socket hook.
#[derive(Debug, Serialize)]
pub struct SocketReport {
    /// True if all needed programs are attached.
    pub attached: bool,
    /// The programs for unconnected UDP.
    pub sendmsg: SendmsgReport,
    /// Number of calls by verdict; bytes are not counted.
    #[serde(flatten)]
    pub counts: Counts,
}

/// The sendmsg programs of the socket hook.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct SendmsgReport {
    /// Both programs are attached.
    pub attached: bool,
    /// Reason why they are needed, or not.
    pub reason: Option<&'static str>,
}

/// The hook for a metadata service on the node.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct LocalServiceReport {
    /// The program is attached.
    pub attached: bool,
    /// A protected address is local to the node.
    pub desired: bool,
    /// Packets that sockets of the node would receive.
    #[serde(flatten)]
    pub counts: Counts,
}

/// Strict mode.
#[derive(Debug, Serialize)]
pub struct HostReport {
    /// Whether there is a cgroup of Kubernetes pods, and all programs are attached to each.
    pub attached: bool,
    /// Ids of these cgroups: their inode numbers.
    pub cgroups: Vec<u64>,
    /// What was counted there: calls, which have no bytes, and packets.
    #[serde(flatten)]
    pub counts: Counts,
}

/// Something that is not as it should be.
#[derive(Debug, Serialize)]
pub struct Problem {
    /// The interface that has it, or `None` where it is the node's.
    pub interface: Option<String>,
    /// What it is.
    pub problem: String,
    /// What to do.
    pub remedy: String,
}
