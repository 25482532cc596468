//! What is in force, as the kernel says it: whether or not an agent runs.

mod exemptions;
mod report;
mod table;

use std::collections::{BTreeMap, BTreeSet};

use imds_ebpf_common::{
    Answer, CounterKey, Hook, Mode, Policy, Role, Subject, SubjectKind, TcHook, names::tc_program,
};

pub use self::report::{
    Agent, Configuration, Endpoint, ExemptSender, HostReport, Interface, Problem, Provider, Refused, Report,
    SocketReport, State,
};
use crate::{
    config::{Hooks, Interfaces},
    datapath::{
        DatapathError, clsact, config,
        counters::{self, Counts},
        endpoints, home, hosts, mprog,
        object::{self, Maps, ObjectError},
        pins::{AttachPoint, PinDir},
        pods, records, sockets,
    },
    endpoints::{Endpoint as Guarded, Keep, ipv4},
    node::{kubepods, links::Link, netlink::Netlink},
    pods::Identity,
    reconcile::{Attachment, Order},
    state,
    version::VERSION,
};

/// Version of the JSON form: within one, fields are only added.
const SCHEMA: u32 = 1;
/// How often to ask until hooks and mode are the same before and after.
const ATTEMPTS: usize = 5;

/// Asks the kernel.
pub async fn gather(pins: &PinDir, netlink: &Netlink) -> Result<Report, DatapathError> {
    for _ in 0..ATTEMPTS {
        let before = policy(pins);
        let report = gather_once(pins, netlink).await;
        if policy(pins) == before {
            return report;
        }
    }
    gather_once(pins, netlink).await
}

/// What is in force, where that can be read.
fn policy(pins: &PinDir) -> Option<Policy> {
    Maps::open(pins).ok()?.policy.get(&0, 0).ok()
}

async fn gather_once(pins: &PinDir, netlink: &Netlink) -> Result<Report, DatapathError> {
    let holder = pins.holder()?;
    let mut report = Report {
        schema: SCHEMA,
        version: VERSION,
        pin_dir: pins.root().to_owned(),
        state: State::Unloaded,
        agent: Agent {
            running: holder.is_some(),
            ready: holder.is_some_and(|holder| holder.is_ready),
            pid: holder.and_then(|holder| holder.pid),
        },
        configuration: None,
        mode: None,
        answer: None,
        provider: None,
        endpoints: Vec::new(),
        exemptions: Vec::new(),
        kubernetes: None,
        interfaces: Vec::new(),
        hooks: Vec::new(),
        sockets: None,
        host_network: None,
        departed: Counts::default(),
        total: Counts::default(),
        by_hook: BTreeMap::new(),
        untold: 0,
        problems: Vec::new(),
    };
    if !object::is_loaded(pins) {
        return Ok(report);
    }
    home::ensure_ours(pins)?;
    let maps = match Maps::open(pins) {
        // The first agent pins one after the other, a later one those that somebody removed.
        Err(_) if report.agent.running && !report.agent.ready => {
            report.state = State::Degraded;
            report.problem(None, "the agent has not loaded its programs yet", "wait, or see its log");
            return Ok(report);
        }
        maps => maps?,
    };
    let policy = maps.policy.get(&0, 0).map_err(unreadable)?;
    let mode = Mode::from_u32(policy.mode);
    report.mode = Some(mode.name());
    report.answer = Some(Answer::from_u32(policy.answer).name());
    report.add_configuration(&maps)?;
    let netlink = report.add_endpoints(&maps, netlink)?;
    let hooks = Hooks::from_bits(policy.hooks);
    report.hooks = Hook::ALL.into_iter().filter(|&hook| hooks.has(hook)).map(Hook::name).collect();
    // The other hooks are there before a pod is.
    let is_from_pod_alone =
        hooks.has(Hook::FromPod) && !hooks.has(Hook::NodeEgress) && !hooks.has(Hook::Socket);
    if !report.agent.running && is_from_pod_alone {
        report.problem(
            None,
            "no agent is running: pods that start now are not guarded",
            "start `imds-agent run`",
        );
    } else if report.agent.running && !report.agent.ready {
        report.problem(None, "the agent has not looked at every interface yet", "wait, or see its log");
    }

    report.untold = counters::untold(&maps).map_err(unreadable)?;
    let mut counts = counters::read(&maps).map_err(unreadable)?;
    for ((_, number), of_one) in &counts {
        if let Some(hook) = Hook::ALL.into_iter().find(|&hook| hook as u8 == *number) {
            *report.by_hook.entry(hook.name()).or_default() += *of_one;
        }
    }
    if hooks.has(Hook::Socket) {
        report.add_sockets(
            pins,
            counts.remove(&(CounterKey::DEPARTED, Hook::Socket as u8)).unwrap_or_default(),
        );
    }
    if hooks.has(Hook::HostNetwork) {
        let counted = counts.remove(&(CounterKey::DEPARTED, Hook::HostNetwork as u8));
        report.add_hosts(hosts::missing(pins)?, counted.unwrap_or_default());
    }
    let uplinks = netlink.uplinks().await?;
    report.kubernetes = pods::lookup(&maps).map_err(unreadable)?;
    let names = pods::read(&maps).map_err(unreadable)?;
    let node = Node { pins, maps: &maps, netlink: &netlink, uplinks, hooks, names: &names };
    for link in netlink.links().await? {
        report.add(&link, &node, &mut counts).await?;
    }
    report.add_exemptions(&maps, &names)?;
    // Of interfaces that are gone and not yet forgotten, too.
    for gone in counts.into_values() {
        report.departed += gone;
    }
    report.total += report.departed;
    report.state = match mode {
        _ if !report.problems.is_empty() => State::Degraded,
        Mode::Enforce => State::Enforcing,
        Mode::Audit => State::Auditing,
        Mode::Off => State::Off,
    };
    Ok(report)
}

impl Report {
    fn problem(&mut self, interface: Option<&str>, problem: impl Into<String>, remedy: impl Into<String>) {
        let interface = interface.map(str::to_owned);
        self.problems.push(Problem { interface, problem: problem.into(), remedy: remedy.into() });
    }

    fn add_sockets(&mut self, pins: &PinDir, counts: Counts) {
        self.total += counts;
        let missing = sockets::missing(pins);
        if !missing.is_empty() {
            let remedy =
                if self.agent.running { "the agent's log says why" } else { "start `imds-agent run`" };
            self.problem(None, format!("{} of sockets is not guarded", missing.join(", ")), remedy);
        }
        self.sockets = Some(SocketReport { attached: missing.is_empty(), counts });
    }

    fn add_configuration(&mut self, maps: &Maps) -> Result<(), DatapathError> {
        let record = config::read(maps).map_err(unreadable)?;
        if let Some(config::Refusal { at, error }) =
            record.as_ref().and_then(|record| record.refusal.as_ref())
        {
            let remedy = "put it right; it is then loaded by itself, or by SIGHUP";
            self.problem(None, format!("the configuration before is in force: {error} ({at:.0})"), remedy);
        }
        self.configuration = record.map(|config::Record { generation, path, loaded_at, refusal, .. }| {
            let refused = refusal.map(|config::Refusal { at, error }| Refused { at, error });
            Configuration { generation, file: path, loaded_at, refused }
        });
        Ok(())
    }

    fn add_hosts(&mut self, missing: BTreeMap<u64, Vec<&'static str>>, counts: Counts) {
        self.total += counts;
        let remedy = if self.agent.running { "the agent's log says why" } else { "start `imds-agent run`" };
        for (cgroup, missing) in missing.iter().filter(|(_, missing)| !missing.is_empty()) {
            let problem = format!("{} of cgroup {cgroup} is not guarded", missing.join(", "));
            self.problem(None, problem, remedy);
        }
        if missing.is_empty() {
            let problem = "hostNetwork pods are not held: no cgroup of Kubernetes pods (kubepods) was found";
            self.problem(None, problem, kubepods::why_none());
        }
        let attached = !missing.is_empty() && missing.values().all(Vec::is_empty);
        let cgroups = missing.into_keys().collect();
        self.host_network = Some(HostReport { attached, cgroups, counts });
    }

    /// Adds what is guarded, and returns a connection that knows it.
    fn add_endpoints(&mut self, maps: &Maps, netlink: &Netlink) -> Result<Netlink, DatapathError> {
        let (configured, in_force) = endpoints::provider(maps).map_err(unreadable)?;
        self.provider = Some(Provider { configured, in_force });
        let mut entries: Vec<_> = endpoints::read(maps).map_err(unreadable)?.into_iter().collect();
        entries.sort_by_key(|(_, entry)| entry.id);
        let guarded: Vec<_> =
            entries.iter().map(|(address, entry)| Guarded::from_entry(*address, entry)).collect();
        let to_strings = |keep: &[Keep]| keep.iter().map(ToString::to_string).collect();
        self.endpoints.extend(guarded.iter().map(|Guarded { name, address, keep }| Endpoint {
            name: name.clone(),
            address: *address,
            keep: to_strings(keep),
        }));
        if self.endpoints.is_empty() && self.mode != Some(Mode::Off.name()) {
            self.problem(None, "no endpoint is guarded", "start `imds-agent run`");
        }
        Ok(netlink.clone().with_endpoints(ipv4(&guarded)))
    }

    async fn add(
        &mut self,
        link: &Link,
        node: &Node<'_>,
        counts: &mut BTreeMap<(u32, u8), Counts>,
    ) -> Result<(), DatapathError> {
        let mut sum = Counts::default();
        for edge in TcHook::ALL {
            sum += counts.remove(&(link.index, edge.hook() as u8)).unwrap_or_default();
        }
        self.total += sum;
        // The agent knows the configuration, this command does not.
        let recorded = records::get(node.maps, link.index).and_then(|record| Role::from_u8(record.role));
        let role = recorded.unwrap_or_else(|| state::role(link, &node.uplinks, &Interfaces::default()));
        let wanted = role.edge().filter(|edge| node.hooks.has(edge.hook()));
        let attachment = match wanted {
            Some(edge) => attachment(link, edge, node).await?,
            None => None,
        };
        if wanted.is_some() {
            self.judge(&link.name, attachment);
        }
        self.interfaces.push(Interface {
            ifindex: link.index,
            name: link.name.clone(),
            pod: node.names.get(&Subject::new(SubjectKind::Interface, link.index.into())).cloned(),
            role: role.name(),
            hook: wanted.map(|edge| edge.hook().name()),
            guard: attachment.map(|attachment| attachment.backend.name()),
            first: attachment.map(|attachment| attachment.place == Order::First),
            counts: sum,
        });
        Ok(())
    }

    fn judge(&mut self, name: &str, attachment: Option<Attachment>) {
        let Some(attachment) = attachment else {
            let remedy =
                if self.agent.running { "the agent's log says why" } else { "start `imds-agent run`" };
            return self.problem(Some(name), "is not guarded", remedy);
        };
        if attachment.place != Order::First {
            let remedy =
                format!("`bpftool net show` and `tc filter show dev {name} ingress` (or egress) name them");
            self.problem(Some(name), "other programs see packets first and can let them pass", remedy);
        }
        if !attachment.current {
            let remedy = "an agent that starts replaces it";
            self.problem(Some(name), "runs another program than the pinned one", remedy);
        }
        if !attachment.pinned {
            let remedy = "a running agent pins it again";
            self.problem(Some(name), "the link is not pinned: it ends with the agent", remedy);
        }
    }
}

/// What is asked about every interface.
struct Node<'a> {
    pins: &'a PinDir,
    maps: &'a Maps,
    netlink: &'a Netlink,
    uplinks: BTreeSet<u32>,
    hooks: Hooks,
    names: &'a BTreeMap<Subject, Identity>,
}

/// What guards an edge of an interface; TCX runs before clsact, so it is the one to name where there are both.
async fn attachment(link: &Link, edge: TcHook, node: &Node<'_>) -> Result<Option<Attachment>, DatapathError> {
    let spot = AttachPoint { ifindex: link.index, edge };
    let program = object::pinned_program(node.pins, tc_program(edge, link.frame))?;
    if let Some(attachment) = mprog::find(node.pins, spot, program)? {
        return Ok(Some(attachment));
    }
    Ok(clsact::attachment(node.netlink, spot, program).await?)
}

fn unreadable(source: aya::maps::MapError) -> DatapathError {
    DatapathError::Object(ObjectError::Map { name: "of the pin directory", source })
}
