//! Status of this node, read from the kernel. Works with and without a running agent.

mod cgroup_status;
mod exemption_status;
mod explained_status;
mod interface_status;
mod sink_status;
mod status_report;
mod status_table;

use std::collections::BTreeMap;

use aya::maps::MapError;
use imds_ebpf_common::{
    DenyAction, Hook, Mode, Policy, Subject,
    names::{
        MAP_CONFIG, MAP_COUNTERS, MAP_ENDPOINTS, MAP_KUBERNETES, MAP_PODS, MAP_POLICY, MAP_PROVIDER,
        MAP_REJECTED,
    },
};

use toml::Table;

use self::status_report::NOT_ATTACHED;
pub(crate) use self::status_report::{
    Agent, ExemptSender, ExplainedReport, HookAttachment, HostNetworkReport, Interface, LocalServiceReport,
    NodeAllowEntry, NodeAllowReport, PartReport, Problem, Provider, RejectedProgram, SinkStatus,
    SocketReport, State, StatusReport,
};
pub(crate) use self::{
    cgroup_status::node_allow_entries,
    exemption_status::{exemption_rules, rule_name},
    explained_status::describe as describe_explained,
};
use crate::{
    config::Hooks,
    datapath::{
        DatapathError,
        maps::{
            config_record::{self, EXPLAIN, EffectiveConfig, RejectedConfig},
            counters, endpoint_maps, pod_names,
        },
        object::{self, Maps, ObjectError},
        pin::{
            agents,
            dir::PinDir,
            lock::{self, LockOwner, UNPINNED, UNPINNED_REMEDY},
            mount_namespace::{PRIVATE_BPFFS, PRIVATE_BPFFS_REMEDY},
            netns_owner,
        },
    },
    escape::escape,
    kube::pod_ref::PodRef,
    node::{interface_role::Uplinks, netlink::Netlink, userspace_ovs},
    version::VERSION,
};

/// Schema version of the JSON output. Removed and changed fields increase it.
const SCHEMA: u32 = 1;
/// Remedy for a rule that does not exempt all senders that it matches.
const EXEMPTION_REMEDY: &str = "see the reason and the agent's log; senders that the agent does not find, or that the broker does not serve, stay denied";
/// Remedy for a broker that does not explain denials.
const EXPLAIN_REMEDY: &str = "see the agent's log; the pods are denied, and get the error of denied calls";
/// Maximum number of attempts to read a status during which the policy does not change.
const ATTEMPTS: usize = 5;

/// Parts of the status that a report contains.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Scope {
    All,
    /// Without counters, pods and exempt senders, of which there are several for each interface.
    Enforcement,
}

/// Returns the complete status.
pub(crate) async fn gather(pins: &PinDir, netlink: &Netlink) -> Result<StatusReport, DatapathError> {
    gather_parts(pins, netlink, Scope::All).await
}

/// Returns the parts of the status that [`StatusReport::not_enforced`] and [`StatusReport::gaps`] need. The agent reads them
/// again and again.
pub(crate) async fn gather_enforcement(
    pins: &PinDir,
    netlink: &Netlink,
) -> Result<StatusReport, DatapathError> {
    gather_parts(pins, netlink, Scope::Enforcement).await
}

async fn gather_parts(pins: &PinDir, netlink: &Netlink, scope: Scope) -> Result<StatusReport, DatapathError> {
    for _ in 0..ATTEMPTS {
        let before = policy(pins);
        let report = gather_once(pins, netlink, scope).await;
        if policy(pins) == before {
            return report;
        }
    }
    gather_once(pins, netlink, scope).await
}

fn policy(pins: &PinDir) -> Option<Policy> {
    Maps::open(pins).ok()?.policy.get(&0, 0).ok()
}

async fn gather_once(pins: &PinDir, netlink: &Netlink, scope: Scope) -> Result<StatusReport, DatapathError> {
    let is_complete = scope == Scope::All;
    let holder = pins.lock_owner()?;
    let mut report = StatusReport::unloaded(pins, holder.as_ref());
    if !object::is_loaded(pins) {
        if let Some(LockOwner { pid, .. }) = lock::unpinned_agent()? {
            report.state = State::Degraded;
            report.agent = Agent { running: true, ready: false, pid };
            report.problem(None, UNPINNED, UNPINNED_REMEDY);
        }
        return Ok(report);
    }
    netns_owner::ensure_own_netns(pins)?;
    let maps = match Maps::open(pins) {
        // A starting agent pins the maps one after the other.
        Err(_) if report.agent.running && !report.agent.ready => {
            report.state = State::Degraded;
            report.problem(None, "the agent has not loaded its programs yet", "wait, or see the agent's log");
            return Ok(report);
        }
        maps => maps?,
    };
    let policy = maps.policy.get(&0, 0).map_err(unreadable(MAP_POLICY))?;
    let mode = Mode::from_u32(policy.mode);
    report.mode = Some(mode.name());
    report.on_deny = Some(DenyAction::from_u32(policy.on_deny).name());
    report.add_configuration(&maps)?;
    let netlink = report.add_endpoints(&maps, netlink)?;
    let hooks = Hooks::from_bits(policy.hooks);
    report.hooks = Hook::ALL.into_iter().filter(|&hook| hooks.contains(hook)).map(Hook::name).collect();
    report.add_rejected_programs(pins, &maps)?;
    if pins.is_private() {
        report.problem(None, PRIVATE_BPFFS, PRIVATE_BPFFS_REMEDY);
    }
    for agent in agents::find(pins) {
        report.problem(None, agent.to_string(), agent.remedy());
    }
    if !report.agent.running {
        report.problem(
            None,
            "no agent is running: no program is attached to new pods, and detached programs are not restored",
            "start `imds-agent run`",
        );
    } else if !report.agent.ready {
        report.problem(
            None,
            "the agent has not reconciled all interfaces yet",
            "wait, or see the agent's log",
        );
    }

    report.add_sinks(&maps)?;
    let mut counts = BTreeMap::new();
    if is_complete {
        report.pending_events = counters::pending_events(&maps).map_err(unreadable(MAP_COUNTERS))?;
        counts = counters::read(&maps).map_err(unreadable(MAP_COUNTERS))?;
    }
    for ((_, number), of_one) in &counts {
        if let Some(hook) = Hook::ALL.into_iter().find(|&hook| hook as u8 == *number) {
            *report.by_hook.entry(hook.name()).or_default() += *of_one;
        }
    }
    report.add_cgroups(pins, &maps, hooks, &mut counts)?;
    let links = netlink.links().await?;
    let uplinks = Uplinks::new(&netlink.endpoint_routes().await?, links.iter());
    report.kubernetes = pod_names::read_watch_status(&maps).map_err(unreadable(MAP_KUBERNETES))?;
    report.add_disputes();
    let mut names = BTreeMap::new();
    if is_complete {
        names = pod_names::read(&maps).map_err(unreadable(MAP_PODS))?;
    }
    let node = Node { pins, maps: &maps, netlink: &netlink, uplinks, hooks, names: &names };
    if let Some(port) = userspace_ovs::find(&links) {
        report.problem(Some(&port.name), userspace_ovs::PROBLEM, userspace_ovs::REMEDY);
    }
    for link in links {
        report.add(&link, &node, &mut counts).await?;
    }
    if report.lacks_attach_points() {
        let remedy = "enable another hook, or exclude fewer interfaces (`interfaces.exclude`)";
        report.problem(None, NOT_ATTACHED, remedy);
    }
    if is_complete {
        report.add_exemptions(&maps, &names)?;
    }
    // Also of interfaces that were deleted and whose counters the agent has not yet added to those of deleted ones.
    for gone in counts.into_values() {
        report.deleted += gone;
    }
    report.total += report.deleted;
    report.state = match mode {
        _ if !report.problems.is_empty() => State::Degraded,
        Mode::Enforce => State::Enforcing,
        Mode::Audit => State::Auditing,
        Mode::Off => State::Off,
    };
    Ok(report)
}

impl StatusReport {
    fn unloaded(pins: &PinDir, holder: Option<&LockOwner>) -> Self {
        Self {
            schema: SCHEMA,
            version: VERSION,
            pin_dir: pins.root().to_owned(),
            agent: Agent {
                running: holder.is_some(),
                ready: holder.is_some_and(|holder| holder.is_ready),
                pid: holder.and_then(|holder| holder.pid),
            },
            ..Self::default()
        }
    }

    fn problem(&mut self, interface: Option<&str>, problem: impl Into<String>, remedy: impl Into<String>) {
        let interface = interface.map(str::to_owned);
        let [problem, remedy] =
            [problem.into(), remedy.into()].map(|text: String| escape(&text).into_owned());
        self.problems.push(Problem { interface, problem, remedy, is_gap: true });
    }

    /// Adds a problem that lets no request of a pod pass.
    fn problem_without_gap(&mut self, problem: impl Into<String>, remedy: impl Into<String>) {
        self.problem(None, problem, remedy);
        if let Some(problem) = self.problems.last_mut() {
            problem.is_gap = false;
        }
    }

    fn add_configuration(&mut self, maps: &Maps) -> Result<(), DatapathError> {
        let record = config_record::read(maps).map_err(unreadable(MAP_CONFIG))?;
        if let Some(EffectiveConfig { path, rejected: Some(RejectedConfig { at, error }), .. }) = &record {
            let from = path.as_ref().map_or_else(
                || "the built-in defaults".to_owned(),
                |path| format!("the configuration loaded from {}", path.display()),
            );
            let remedy = "correct the file (`imds-agent config check FILE` lists all errors); the agent loads it when it changes, \
                          or on SIGHUP";
            self.problem_without_gap(
                format!("configuration rejected, using {from}: {error} ({at:.0})"),
                remedy,
            );
        }
        // In mode `off` nothing is denied.
        let is_off = self.mode == Some(Mode::Off.name());
        for error in record.iter().filter(|_| !is_off).flat_map(|record| &record.exemption_errors) {
            match error.strip_prefix(EXPLAIN).and_then(|error| error.strip_prefix(": ")) {
                Some(error) => {
                    self.problem_without_gap(format!("denials are not explained: {error}"), EXPLAIN_REMEDY);
                }
                None => self.problem_without_gap(
                    format!("exemption not applied completely: {error}"),
                    EXEMPTION_REMEDY,
                ),
            }
        }
        self.configuration = record;
        Ok(())
    }

    /// Adds the programs that the kernel rejected, each a problem of its hook.
    fn add_rejected_programs(&mut self, pins: &PinDir, maps: &Maps) -> Result<(), DatapathError> {
        for (hook, program, error) in object::rejected_programs(maps).map_err(unreadable(MAP_REJECTED))? {
            let name = hook.name();
            let has_earlier = object::pinned_program(pins, program).is_ok();
            let problem = if has_earlier {
                format!("{name} runs {program} of an earlier agent: failed to load the new program: {error}")
            } else {
                format!("{name} is not enforced: failed to load BPF program {program}: {error}")
            };
            let switch_off = match hook {
                Hook::NodeAllow => "remove node.allow".to_owned(),
                other => format!("set hooks.{} = false", other.name()),
            };
            let remedy = format!(
                "see the agent's log for the verifier's message; allow the agent to load BPF programs, or {switch_off}"
            );
            self.problem(None, problem, remedy);
            self.rejected_programs.push(RejectedProgram {
                program,
                hook: name,
                error: error.to_string(),
                has_earlier,
            });
        }
        Ok(())
    }

    fn add_disputes(&mut self) {
        let disputed = self.kubernetes.as_ref().map_or(0, |watch_status| watch_status.disputed);
        if disputed > 0 {
            self.problem_without_gap(
                format!("{disputed} pods claim the cgroup of another pod by the annotation kubernetes.io/config.hash"),
                "delete the copies: the agent's log names them",
            );
        }
    }

    /// Adds the protected endpoints, and returns a connection that treats routes to them as uplinks.
    fn add_endpoints(&mut self, maps: &Maps, netlink: &Netlink) -> Result<Netlink, DatapathError> {
        let (configured, effective) = endpoint_maps::provider(maps).map_err(unreadable(MAP_PROVIDER))?;
        self.provider = Some(Provider { configured, effective });
        self.endpoints = endpoint_maps::read(maps).map_err(unreadable(MAP_ENDPOINTS))?;
        if self.endpoints.is_empty() && self.mode != Some(Mode::Off.name()) {
            self.problem(None, "no endpoint is protected", "start `imds-agent run`");
        }
        Ok(netlink.clone().with_endpoints(self.endpoints.iter().map(|endpoint| endpoint.address).collect()))
    }
}

/// State of the node that the reports of all interfaces share.
pub(crate) struct Node<'a> {
    pins: &'a PinDir,
    maps: &'a Maps,
    netlink: &'a Netlink,
    uplinks: Uplinks,
    hooks: Hooks,
    names: &'a BTreeMap<Subject, PodRef>,
}

/// Returns the effective configuration as TOML; empty if none is recorded.
fn effective_table(maps: &Maps) -> Result<Table, DatapathError> {
    let record = config_record::read(maps).map_err(unreadable(MAP_CONFIG))?;
    Ok(record.and_then(|record| record.text.parse().ok()).unwrap_or_default())
}

/// Returns the conversion of errors of the map `name`.
fn unreadable(name: &'static str) -> impl FnOnce(MapError) -> DatapathError {
    move |source| DatapathError::Object(ObjectError::Map { name, source })
}
