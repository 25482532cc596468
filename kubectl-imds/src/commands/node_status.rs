//! Status of one node, from `imds-agent status` or from the metrics of the agent.

use std::collections::BTreeMap;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::exposition::{Sample, samples};
use crate::fleet::{AskError, Fleet, Target, check_schema};

/// Problems of a node that are kept. An agent with more of them counts the others.
const MAX_PROBLEMS: usize = 50;

/// Way to the agents.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
pub(crate) enum Via {
    /// Commands in the agent's pods
    #[default]
    Exec,
    /// The agent's metrics, through the proxy of the API server
    Metrics,
}

/// Fields of a status that metrics do not have.
pub(crate) const ONLY_BY_EXEC: [&str; 4] = ["on_deny", "provider", "endpoints", "texts of problems"];

/// Status of a node. A field is `None` if the source does not have it.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct NodeStatus {
    pub(crate) version: String,
    /// `enforcing`, `auditing`, `off`, `degraded` or `unloaded`.
    pub(crate) state: String,
    pub(crate) ready: bool,
    pub(crate) mode: Option<String>,
    pub(crate) on_deny: Option<String>,
    pub(crate) provider: Option<String>,
    pub(crate) endpoints: Option<Vec<String>>,
    pub(crate) hooks: Vec<String>,
    /// Hooks on cgroups, each with its state.
    pub(crate) cgroup_hooks: BTreeMap<String, bool>,
    pub(crate) config_hash: Option<String>,
    pub(crate) config_generation: Option<u64>,
    /// Pool of the node whose settings the configuration has.
    pub(crate) node_pool: Option<String>,
    /// A newer configuration was rejected.
    pub(crate) config_rejected: bool,
    pub(crate) config_error: Option<String>,
    /// Hooks of interfaces that are attached, and that should be.
    pub(crate) attached: usize,
    pub(crate) attachments: usize,
    pub(crate) problem_count: usize,
    pub(crate) problems: Vec<String>,
}

impl NodeStatus {
    /// Reports whether the node is in the state that its configuration requires.
    pub(crate) fn is_healthy(&self) -> bool {
        ["enforcing", "auditing", "off"].contains(&&*self.state) && self.ready && !self.config_rejected
    }
}

/// Requests the status of a node.
pub(crate) async fn ask(fleet: &Fleet, target: &Target, via: Via, port: u16) -> Result<NodeStatus, AskError> {
    match via {
        Via::Exec => from_document(fleet.json(target, &["status", "-o", "json"]).await?),
        Via::Metrics => from_metrics(&fleet.api.metrics(&fleet.namespace, &target.pod, port).await?),
    }
}

/// Output of `imds-agent status -o json`, with the fields that the plugin reads: see docs/json.md.
#[derive(Debug, Deserialize)]
pub(crate) struct StatusDocument {
    schema: u64,
    version: String,
    state: String,
    agent: AgentProcess,
    configuration: Option<Configuration>,
    mode: Option<String>,
    on_deny: Option<String>,
    provider: Option<Provider>,
    endpoints: Vec<Endpoint>,
    interfaces: Vec<Interface>,
    hooks: Vec<String>,
    sockets: Option<CgroupHook>,
    host_network: Option<CgroupHook>,
    local_service: Option<CgroupHook>,
    #[serde(default)]
    node_allow: Option<CgroupHook>,
    problems: Vec<Problem>,
}

#[derive(Debug, Deserialize)]
struct AgentProcess {
    ready: bool,
}

#[derive(Debug, Deserialize)]
struct Configuration {
    generation: u64,
    /// Agents of version 0.1.0 and older have none.
    #[serde(default)]
    hash: Option<String>,
    /// Agents without settings for pools have none.
    #[serde(default)]
    node_pool: Option<String>,
    rejected: Option<Rejected>,
}

#[derive(Debug, Deserialize)]
struct Rejected {
    error: String,
}

#[derive(Debug, Deserialize)]
struct Provider {
    effective: String,
}

#[derive(Debug, Deserialize)]
struct Endpoint {
    name: String,
    address: String,
    allow_ports: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct Interface {
    attachments: Vec<Attachment>,
}

#[derive(Debug, Deserialize)]
struct Attachment {
    attach_mode: Option<String>,
}

#[derive(Debug, Deserialize)]
struct CgroupHook {
    attached: bool,
    /// Only `local_service` has the field: without a metadata service on the node, the hook is not needed.
    #[serde(default = "yes")]
    desired: bool,
}

const fn yes() -> bool {
    true
}

#[derive(Debug, Deserialize)]
struct Problem {
    interface: Option<String>,
    problem: String,
}

fn from_document(document: StatusDocument) -> Result<NodeStatus, AskError> {
    check_schema(document.schema)?;
    let attachments = || document.interfaces.iter().flat_map(|interface| &interface.attachments);
    let endpoint = |Endpoint { name, address, allow_ports }: Endpoint| {
        let allowed = if allow_ports.is_empty() {
            String::new()
        } else {
            format!(", allows {}", allow_ports.join(" "))
        };
        format!("{address} ({name}){allowed}")
    };
    let hooks = [
        ("socket", document.sockets),
        ("host_network", document.host_network),
        ("local_service", document.local_service),
        ("node_allow", document.node_allow),
    ];
    let cgroup_hooks = hooks.into_iter().filter_map(|(name, hook)| {
        hook.filter(|hook| hook.desired).map(|hook| (name.to_owned(), hook.attached))
    });
    let problem_count = document.problems.len();
    let problems = document.problems.into_iter().take(MAX_PROBLEMS).map(|Problem { interface, problem }| {
        interface.map(|interface| format!("{interface}: ")).unwrap_or_default() + &problem
    });
    let configuration = document.configuration;
    let rejected = configuration.as_ref().and_then(|configuration| configuration.rejected.as_ref());
    Ok(NodeStatus {
        version: document.version,
        state: document.state,
        ready: document.agent.ready,
        mode: document.mode,
        on_deny: document.on_deny,
        provider: document.provider.map(|provider| provider.effective),
        attached: attachments().filter(|attachment| attachment.attach_mode.is_some()).count(),
        attachments: attachments().count(),
        endpoints: Some(document.endpoints.into_iter().map(endpoint).collect()),
        hooks: document.hooks,
        cgroup_hooks: cgroup_hooks.collect(),
        config_rejected: rejected.is_some(),
        config_error: rejected.map(|rejected| rejected.error.clone()),
        config_generation: configuration.as_ref().map(|configuration| configuration.generation),
        node_pool: configuration.as_ref().and_then(|configuration| configuration.node_pool.clone()),
        config_hash: configuration.and_then(|configuration| fold(&configuration.hash?)),
        problem_count,
        problems: problems.collect(),
    })
}

/// Folds a hash of 16 digits to the 48 bits that the metric has, so that both ways show the same hash.
fn fold(hash: &str) -> Option<String> {
    let hash = u64::from_str_radix(hash, 16).ok().filter(|_| hash.len() == 16)?;
    Some(format!("{:012x}", (hash >> 48) ^ (hash & 0xffff_ffff_ffff)))
}

/// Converts the metrics of an agent: see docs/metrics.md.
fn from_metrics(text: &str) -> Result<NodeStatus, AskError> {
    let mut status = NodeStatus::default();
    let mut problems = None;
    for sample in samples(text) {
        let number = whole(sample.value);
        match sample.name {
            "imds_agent_build_info" => sample.label("version").clone_into(&mut status.version),
            "imds_agent_mode" if number == 1 => status.mode = Some(sample.label("mode").to_owned()),
            "imds_agent_ready" => status.ready = number == 1,
            "imds_agent_problems" => problems = Some(number),
            "imds_agent_config_hash" => status.config_hash = Some(format!("{number:012x}")),
            "imds_agent_config_generation" => status.config_generation = Some(number),
            "imds_agent_config_last_reload_successful" => status.config_rejected = number == 0,
            "imds_agent_interfaces" => add_interfaces(&mut status, &sample, number),
            "imds_agent_cgroup_hook_attached" => {
                let hook = sample.label("hook");
                status.cgroup_hooks.insert(hook.to_owned(), number == 1);
            }
            _ => {}
        }
    }
    let Some(problems) = problems else {
        return Err(AskError::Content("the response has no metric imds_agent_problems".to_owned()));
    };
    status.problem_count = usize::try_from(problems).unwrap_or(usize::MAX);
    let state = match status.mode.as_deref() {
        None => "unloaded",
        Some(_) if problems > 0 || !status.ready => "degraded",
        Some("enforce") => "enforcing",
        Some("audit") => "auditing",
        Some("off") => "off",
        Some(_) => "degraded",
    };
    state.clone_into(&mut status.state);
    Ok(status)
}

fn add_interfaces(status: &mut NodeStatus, sample: &Sample<'_>, number: u64) {
    let hook = sample.label("hook").to_owned();
    if !status.hooks.contains(&hook) {
        status.hooks.push(hook);
    }
    let number = usize::try_from(number).unwrap_or(usize::MAX);
    status.attachments = status.attachments.saturating_add(number);
    if sample.label("state") == "enforced" {
        status.attached = status.attached.saturating_add(number);
    }
}

/// Returns a sample as a whole number; 0 if it is none.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "gauges of the agent are whole numbers of at most 48 bits; `as` saturates for all others"
)]
const fn whole(value: f64) -> u64 {
    value as u64
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// Returns the output of `imds-agent status -o json` of a node without problems.
    pub(crate) fn document() -> Value {
        json!({
            "schema": 1, "version": "0.1.0", "state": "enforcing", "agent": { "running": true, "ready": true },
            "configuration": { "generation": 3, "hash": "0123456789abcdef", "rejected": null },
            "mode": "enforce", "on_deny": "drop", "provider": { "configured": "auto", "effective": "azure" },
            "endpoints": [{ "name": "imds", "address": "169.254.169.254", "allow_ports": ["udp/53"] }],
            "interfaces": [
                { "name": "veth0", "attachments": [
                    { "hook": "from_pod", "attach_mode": "tcx" }, { "hook": "node_egress", "attach_mode": null },
                ] },
                { "name": "lo", "attachments": [] },
            ],
            "hooks": ["from_pod", "node_egress", "socket"], "sockets": { "attached": true },
            "host_network": null, "local_service": { "attached": false, "desired": false },
            "problems": [],
        })
    }

    fn parse(document: Value) -> Result<NodeStatus, AskError> {
        from_document(serde_json::from_value(document).unwrap())
    }

    #[test]
    fn document_becomes_a_status() {
        let status = parse(document()).unwrap();
        assert!(status.is_healthy());
        assert_eq!((status.attached, status.attachments), (1, 2));
        assert_eq!(status.endpoints.unwrap(), ["169.254.169.254 (imds), allows udp/53"]);
        assert_eq!(status.config_hash.as_deref(), Some("456789abcccc"));
        assert_eq!(status.cgroup_hooks, BTreeMap::from([("socket".to_owned(), true)]));
        let mut other = document();
        other["schema"] = json!(2);
        assert!(parse(other).unwrap_err().to_string().contains("schema 2"));
        let mut earlier = document();
        earlier["configuration"].as_object_mut().unwrap().remove("hash");
        assert_eq!(parse(earlier).unwrap().config_hash, None);
    }

    #[test]
    fn no_unhealthy_node_is_called_healthy() {
        for (path, value) in [
            ("/state", json!("degraded")),
            ("/state", json!("unloaded")),
            ("/state", json!("another")),
            ("/agent/ready", json!(false)),
            ("/configuration/rejected", json!({ "error": "e" })),
        ] {
            let mut document = document();
            *document.pointer_mut(path).unwrap() = value;
            assert!(!parse(document).unwrap().is_healthy(), "{path}");
        }
    }

    #[test]
    fn metrics_become_a_status() {
        let text = "imds_agent_build_info{version=\"0.1.0\",commit=\"x\",kernel=\"6\"} 1
imds_agent_mode{mode=\"enforce\"} 1\nimds_agent_mode{mode=\"audit\"} 0\nimds_agent_ready 1\nimds_agent_problems 0
imds_agent_config_hash 76310993685708\nimds_agent_config_last_reload_successful 1
imds_agent_interfaces{hook=\"from_pod\",state=\"enforced\"} 1\nimds_agent_interfaces{hook=\"from_pod\",state=\"unenforced\"} 1
imds_agent_cgroup_hook_attached{hook=\"socket\"} 1\n";
        let status = from_metrics(text).unwrap();
        assert!(status.is_healthy());
        assert_eq!((&*status.state, &*status.version), ("enforcing", "0.1.0"));
        assert_eq!(status.config_hash, fold("0123456789abcdef"));
        assert_eq!((status.attached, status.attachments), (1, 2));
        let degraded = from_metrics(&text.replace("problems 0", "problems 2")).unwrap();
        assert_eq!((&*degraded.state, degraded.problem_count), ("degraded", 2));
        let not_ready = from_metrics(&text.replace("ready 1", "ready 0")).unwrap();
        assert_eq!(not_ready.state, "degraded");
        let unloaded = from_metrics(&text.replace("enforce\"} 1", "enforce\"} 0")).unwrap();
        assert_eq!(unloaded.state, "unloaded");
        assert!(from_metrics("<html>").is_err());
    }
}
