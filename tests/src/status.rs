//! Output of `imds-agent status -o json`, schema 1.

use std::path::PathBuf;

use serde::Deserialize;

/// The whole document. Ignores keys that later versions add; a missing key is an error.
#[derive(Clone, Debug, Deserialize)]
#[expect(missing_docs, reason = "documented with the command")]
pub struct Status {
    pub schema: u32,
    pub version: String,
    pub pin_dir: PathBuf,
    pub state: String,
    pub agent: AgentProcess,
    pub configuration: Option<Configuration>,
    pub mode: Option<String>,
    pub on_deny: Option<String>,
    /// Missing in the output of earlier versions.
    #[serde(default)]
    pub explained: Option<Explained>,
    pub provider: Option<Provider>,
    pub endpoints: Vec<Endpoint>,
    pub exemptions: Vec<ExemptSender>,
    pub kubernetes: Option<Kubernetes>,
    pub interfaces: Vec<Interface>,
    pub hooks: Vec<String>,
    pub sockets: Option<Sockets>,
    pub host_network: Option<HostNetwork>,
    pub local_service: Option<LocalService>,
    /// Agents of earlier versions have none.
    #[serde(default)]
    pub node_allow: Option<NodeAllow>,
    pub deleted: Counts,
    pub total: Counts,
    pub problems: Vec<Problem>,
}

/// Pods whose denials are explained.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq)]
#[expect(missing_docs, reason = "documented with the command")]
pub struct Explained {
    pub pods: usize,
    pub reason: Option<String>,
}

/// Status of the pod watch.
#[derive(Clone, Debug, Deserialize)]
#[expect(missing_docs, reason = "documented with the command")]
pub struct Kubernetes {
    pub node: String,
    pub connected: bool,
    pub since: String,
    pub synced_at: Option<String>,
    pub failed_at: Option<String>,
    pub error: Option<String>,
    pub pods: u32,
    pub unresolved: u32,
    /// Missing in the output of earlier versions.
    #[serde(default)]
    pub disputed: u32,
    /// Missing in the output of earlier versions.
    #[serde(default)]
    pub namespaces: Option<Namespaces>,
}

/// Status of the namespace watch.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq)]
#[expect(missing_docs, reason = "documented with the command")]
pub struct Namespaces {
    pub connected: bool,
    pub known: u32,
    pub error: Option<String>,
}

/// Kubernetes metadata of a pod.
#[derive(Clone, Debug, Deserialize)]
#[expect(missing_docs, reason = "documented with the command")]
pub struct Identity {
    pub namespace: String,
    pub pod: String,
    pub service_account: String,
    pub container: Option<String>,
    pub label: Option<String>,
    pub uid: String,
}

/// A sender that matches an exemption.
#[derive(Clone, Debug, Deserialize)]
#[expect(missing_docs, reason = "documented with the command")]
pub struct ExemptSender {
    pub rule: String,
    pub interface: Option<String>,
    pub netns_cookie: Option<u64>,
    pub cgroup: Option<u64>,
    pub pod: Option<Identity>,
    pub endpoint: Option<String>,
    pub verdict: String,
    pub allow: Option<Vec<String>>,
    pub other_rules: u32,
}

/// The agent process that holds the lock of the pin directory.
#[derive(Clone, Debug, Deserialize)]
#[expect(missing_docs, reason = "documented with the command")]
pub struct AgentProcess {
    pub running: bool,
    pub ready: bool,
    pub pid: Option<u32>,
}

/// The configuration that the agent enforces.
#[derive(Clone, Debug, Deserialize)]
#[expect(missing_docs, reason = "documented with the command")]
pub struct Configuration {
    pub generation: u64,
    /// Agents of earlier versions have none.
    #[serde(default)]
    pub hash: String,
    pub file: Option<PathBuf>,
    /// Missing in the output of earlier versions.
    #[serde(default)]
    pub node_pool: Option<String>,
    pub loaded_at: String,
    pub rejected: Option<RejectedConfig>,
}

/// A configuration file that the agent rejected.
#[derive(Clone, Debug, Deserialize)]
#[expect(missing_docs, reason = "documented with the command")]
pub struct RejectedConfig {
    pub at: String,
    pub error: String,
}

/// Cloud provider that determines the endpoints.
#[derive(Clone, Debug, Deserialize)]
#[expect(missing_docs, reason = "documented with the command")]
pub struct Provider {
    pub configured: String,
    pub effective: String,
}

/// A protected endpoint with its allowed ports.
#[derive(Clone, Debug, Deserialize)]
#[expect(missing_docs, reason = "documented with the command")]
pub struct Endpoint {
    pub name: String,
    pub address: String,
    pub allow_ports: Vec<String>,
}

/// A network interface of the node.
#[derive(Clone, Debug, Deserialize)]
#[expect(missing_docs, reason = "documented with the command")]
pub struct Interface {
    pub ifindex: u32,
    pub name: String,
    pub pod: Option<Identity>,
    pub role: String,
    pub attachments: Vec<HookAttachment>,
    #[serde(flatten)]
    pub counts: Counts,
}

/// A TC hook that an interface should have, and its program.
#[derive(Clone, Debug, Deserialize)]
#[expect(missing_docs, reason = "documented with the command")]
pub struct HookAttachment {
    pub hook: String,
    pub attach_mode: Option<String>,
    pub order: Option<String>,
    pub pending: bool,
}

impl Interface {
    /// Returns the attach mode of the interface's first hook, if its program is attached.
    #[must_use]
    pub fn attach_mode(&self) -> Option<&str> {
        self.attachments.first()?.attach_mode.as_deref()
    }

    /// Reports whether the interface has hooks and each has its program.
    #[must_use]
    pub fn is_attached(&self) -> bool {
        let is_attached = |attachment: &HookAttachment| attachment.attach_mode.is_some();
        !self.attachments.is_empty() && self.attachments.iter().all(is_attached)
    }

    /// Reports whether each program runs before all others; `None` if one is not attached or there are no hooks.
    #[must_use]
    pub fn is_first(&self) -> Option<bool> {
        let is_first = |attachment: &HookAttachment| attachment.order.as_deref() == Some("first");
        self.is_attached().then(|| self.attachments.iter().all(is_first))
    }

    /// The attachment at this hook, if the interface should have one.
    #[must_use]
    pub fn attachment(&self, hook: &str) -> Option<&HookAttachment> {
        self.attachments.iter().find(|attachment| attachment.hook == hook)
    }
}

/// Packets to protected endpoints, by verdict.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq)]
#[expect(missing_docs, reason = "documented with the command")]
pub struct Counts {
    pub denied: Count,
    pub audited: Count,
    pub allowed: Count,
    pub exempt: Count,
    pub redirected: Count,
}

/// State of the `socket` hook.
#[derive(Clone, Debug, Deserialize)]
#[expect(missing_docs, reason = "documented with the command")]
pub struct Sockets {
    pub attached: bool,
    pub sendmsg: Sendmsg,
    #[serde(flatten)]
    pub counts: Counts,
}

/// State of the sendmsg programs.
#[derive(Clone, Debug, Deserialize)]
#[expect(missing_docs, reason = "documented with the command")]
pub struct Sendmsg {
    pub attached: bool,
    pub reason: Option<String>,
}

/// State of the hook for a metadata service on the node.
#[derive(Clone, Debug, Deserialize)]
#[expect(missing_docs, reason = "documented with the command")]
pub struct LocalService {
    pub attached: bool,
    pub desired: bool,
    #[serde(flatten)]
    pub counts: Counts,
}

/// State of the `host_network` hook.
#[derive(Clone, Debug, Deserialize)]
#[expect(missing_docs, reason = "documented with the command")]
pub struct HostNetwork {
    pub attached: bool,
    pub cgroups: Vec<u64>,
    #[serde(flatten)]
    pub counts: Counts,
}

/// Allow list of the node, and state of its hook.
#[derive(Clone, Debug, Deserialize)]
#[expect(missing_docs, reason = "documented with the command")]
pub struct NodeAllow {
    pub attached: bool,
    pub packets: Packets,
    pub cgroup: Option<u64>,
    pub allow: Vec<NodeAllowEntry>,
    #[serde(flatten)]
    pub counts: Counts,
}

/// State of the packet program of the allow list of the node.
#[derive(Clone, Debug, Deserialize)]
#[expect(missing_docs, reason = "documented with the command")]
pub struct Packets {
    pub attached: bool,
    pub reason: Option<String>,
}

/// Entry of the allow list of the node.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq)]
#[expect(missing_docs, reason = "documented with the command")]
pub struct NodeAllowEntry {
    pub process: String,
    pub active: bool,
}

/// Number of packets and bytes.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq)]
#[expect(missing_docs, reason = "documented with the command")]
pub struct Count {
    pub packets: u64,
    pub bytes: u64,
}

/// A problem that the agent reports.
#[derive(Clone, Debug, Deserialize)]
#[expect(missing_docs, reason = "documented with the command")]
pub struct Problem {
    pub interface: Option<String>,
    pub problem: String,
    pub remedy: String,
}

impl Status {
    /// Returns the generation of the effective configuration.
    ///
    /// # Panics
    ///
    /// Panics if no configuration is loaded.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.configuration.as_ref().expect("a configuration").generation
    }

    /// Returns the interface with this name, if the agent knows it.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<&Interface> {
        self.interfaces.iter().find(|interface| interface.name == name)
    }

    /// Returns the interface with this name. Panics if the agent does not know it.
    #[must_use]
    #[track_caller]
    pub fn interface(&self, name: &str) -> &Interface {
        self.find(name).unwrap_or_else(|| panic!("no {name} in {self:#?}"))
    }

    /// Reports whether the program of `hook` is attached to the interface with this name.
    #[must_use]
    pub fn has_attached(&self, interface: &str, hook: &str) -> bool {
        let attachment = self.find(interface).and_then(|found| found.attachment(hook));
        attachment.is_some_and(|attachment| attachment.attach_mode.is_some())
    }

    /// Returns the sum of `get` over the counts of every interface, deleted ones included.
    #[must_use]
    pub fn sum(&self, get: impl Fn(&Counts) -> u64) -> u64 {
        let of_interfaces: u64 = self.interfaces.iter().map(|interface| get(&interface.counts)).sum();
        of_interfaces + get(&self.deleted)
    }

    /// Returns the number of denied packets on all interfaces, deleted ones included.
    #[must_use]
    pub fn denied(&self) -> u64 {
        self.total.denied.packets
    }

    /// Asserts that everything is enforced, and that the only problem is the missing agent.
    #[track_caller]
    pub fn assert_lacks_only_an_agent(&self) {
        assert_eq!((self.agent.running, self.agent.pid, self.state.as_str()), (false, None, "degraded"));
        let [Problem { interface: None, .. }] = &self.problems[..] else { panic!("{:#?}", self.problems) };
        assert!(self.all_pods_enforced(), "{:#?}", self.interfaces);
    }

    /// Reports whether an agent runs without problems and every pod interface is enforced.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.agent.ready && self.problems.is_empty() && self.all_pods_enforced()
    }

    /// Reports whether every pod interface has its TCX link instead of a temporary clsact filter.
    #[must_use]
    pub fn all_pods_have_tcx(&self) -> bool {
        let mut pods = self.interfaces.iter().filter(|interface| interface.role == "pod");
        pods.all(|interface| interface.attach_mode() == Some("tcx"))
    }

    /// Reports whether the API server listed this number of pods and the sandbox of each was found.
    #[must_use]
    pub fn has_resolved(&self, pods: usize) -> bool {
        let known = self.kubernetes.as_ref();
        known.is_some_and(|known| known.pods as usize == pods && known.unresolved == 0)
    }

    /// Reports whether every pod interface has all of its programs.
    #[must_use]
    pub fn all_pods_enforced(&self) -> bool {
        let mut attachments = self.interfaces.iter().flat_map(|interface| &interface.attachments);
        // For links of unknown use, `node_egress` is attached once nothing else is pending.
        let is_spare = |attachment: &HookAttachment| attachment.pending && attachment.hook == "node_egress";
        attachments.all(|attachment| attachment.attach_mode.is_some() || is_spare(attachment))
    }
}
