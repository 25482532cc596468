//! Text form of the status report.

use std::{collections::BTreeMap, fmt::Write as _};

use comfy_table::{Cell, CellAlignment, Table, presets::NOTHING};

use super::{
    ExplainedReport, HookAttachment, NodeAllowReport, PartReport, Provider, SinkStatus, State, StatusReport,
};
use crate::{
    datapath::{
        attach::cgroup_programs::ProgramState,
        maps::{
            config_record::EffectiveConfig,
            counters::{Count, Counts},
        },
    },
    escape::escape,
    kube::pod_ref::{NamespaceWatchStatus, PodWatchStatus},
};

impl StatusReport {
    /// Returns the report as text that ends with a newline.
    pub(crate) fn table(&self) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ok = self.write(&mut text);
        text
    }

    fn write(&self, text: &mut String) -> std::fmt::Result {
        if self.state == State::Unloaded {
            let (state, pins) = (self.state, self.pin_dir.display());
            return writeln!(text, "state      {state}\npins       nothing is loaded at {pins}");
        }
        let word = if self.agent.ready { "running" } else { "not ready" };
        let agent = match (self.agent.running, self.agent.pid) {
            (true, Some(pid)) => format!("{word}, pid {pid}"),
            (true, None) => word.to_owned(),
            (false, _) => "not running".to_owned(),
        };
        writeln!(text, "state      {}", self.state)?;
        self.write_configuration(text)?;
        writeln!(text, "mode       {}", self.mode.unwrap_or("unknown"))?;
        let explained = self.explained.as_ref().map(ExplainedReport::text).unwrap_or_default();
        writeln!(text, "on_deny    {}{explained}", self.on_deny.unwrap_or("unknown"))?;
        self.write_endpoints(text)?;
        self.write_exemptions(text)?;
        self.write_kubernetes(text)?;
        writeln!(text, "hooks      {}", self.hooks.join(" "))?;
        if let Some(PartReport { attached, reason }) = self.sockets.as_ref().map(|sockets| sockets.sendmsg) {
            let state = if attached { "attached" } else { "not attached" };
            let reason = reason.map(|reason| format!(" ({reason})")).unwrap_or_default();
            writeln!(text, "sendmsg    {state}{reason}")?;
        }
        self.write_node_allow(text)?;
        for (index, SinkStatus { sink, error }) in self.sinks.iter().enumerate() {
            let title = if index == 0 { "sinks" } else { "" };
            let error = error.as_ref().map(|error| format!(" (failing: {error})")).unwrap_or_default();
            writeln!(text, "{title:<10} {sink}{error}")?;
        }
        writeln!(text, "agent      {agent}")?;
        writeln!(text, "pins       {}", self.pin_dir.display())?;
        writeln!(text)?;
        writeln!(text, "{}", self.interfaces_table().trim_fmt())?;
        if !self.problems.is_empty() {
            writeln!(text, "\nproblems:")?;
        }
        for problem in &self.problems {
            let subject = problem.interface.as_ref().map(|name| format!("{name}: ")).unwrap_or_default();
            writeln!(text, "  {subject}{} ({})", problem.problem, problem.remedy)?;
        }
        Ok(())
    }

    fn write_configuration(&self, text: &mut String) -> std::fmt::Result {
        let Some(EffectiveConfig { generation, path, node_pool, loaded_at, .. }) = &self.configuration else {
            return Ok(());
        };
        let file = path.as_ref().map_or("all defaults".into(), |file| file.to_string_lossy());
        let pool = node_pool.as_ref().map(|pool| format!(", node pool {pool}")).unwrap_or_default();
        writeln!(text, "config     {file}{pool}, generation {generation}, active since {loaded_at:.0}")
    }

    fn write_endpoints(&self, text: &mut String) -> std::fmt::Result {
        match &self.provider {
            Some(Provider { configured, effective }) if configured == effective => {
                writeln!(text, "provider   {effective}")?;
            }
            Some(Provider { configured, effective }) => {
                writeln!(text, "provider   {effective} ({configured})")?;
            }
            None => {}
        }
        if self.endpoints.is_empty() {
            writeln!(text, "endpoints  none")?;
        }
        for (index, endpoint) in self.endpoints.iter().enumerate() {
            let title = if index == 0 { "endpoints" } else { "" };
            writeln!(text, "{title:<10} {endpoint}")?;
        }
        Ok(())
    }

    fn write_exemptions(&self, text: &mut String) -> std::fmt::Result {
        for (index, sender) in self.exemptions.iter().enumerate() {
            let title = if index == 0 { "exempt" } else { "" };
            let who = match (&sender.interface, sender.netns_cookie, sender.cgroup) {
                (Some(interface), _, _) => format!("interface {interface}"),
                (None, Some(cookie), _) => format!("network namespace with cookie {cookie}"),
                (None, None, Some(id)) => format!("cgroup {id}"),
                (None, None, None) => "unknown".to_owned(),
            };
            let pod = sender.pod.as_ref().map(|pod| format!(", pod {pod},")).unwrap_or_default();
            let from = sender.endpoint.as_deref().unwrap_or("all endpoints");
            let audited = if sender.verdict == "audited" { ", audited" } else { "" };
            let others = match sender.other_rules {
                0 => String::new(),
                others => format!(", and those of {others} more rules"),
            };
            let only = sender.allow.as_ref().map(|allow| format!(", only {}{others}", allow.join(", ")));
            let only = only.unwrap_or_default();
            writeln!(text, "{title:<10} {who}{pod} to {from} (rule {}){audited}{only}", sender.rule)?;
        }
        Ok(())
    }

    fn write_kubernetes(&self, text: &mut String) -> std::fmt::Result {
        let Some(PodWatchStatus { node, connected, since, error, pods, unresolved, namespaces, .. }) =
            &self.kubernetes
        else {
            return Ok(());
        };
        let plural = if *pods == 1 { "" } else { "s" };
        write!(text, "kubernetes node {node}, {pods} pod{plural} known")?;
        if *unresolved > 0 {
            write!(text, ", {unresolved} of them unresolved (no sandbox found)")?;
        }
        match (connected, error) {
            (true, _) => writeln!(text)?,
            (false, None) => writeln!(text, ", not connected yet")?,
            (false, Some(error)) => {
                writeln!(text, ", not connected since {since:.0}: {error}")?;
                writeln!(text, "{:<10} exempt pods stay exempt, new pods are not exempt", "")?;
            }
        }
        let Some(NamespaceWatchStatus { connected, known, error }) = namespaces else { return Ok(()) };
        let plural = if *known == 1 { "" } else { "s" };
        let state = match (connected, error) {
            (true, _) => String::new(),
            (false, None) => ", not connected yet".to_owned(),
            (false, Some(error)) => format!(", not connected: {error}"),
        };
        writeln!(text, "{:<10} {known} namespace{plural} known{state}", "")
    }

    fn write_node_allow(&self, text: &mut String) -> std::fmt::Result {
        let Some(NodeAllowReport { packets, allow, .. }) = &self.node_allow else { return Ok(()) };
        let entries = allow.iter().map(|entry| {
            let found = if entry.active { "" } else { " (not found)" };
            format!("{}{found}", escape(&entry.process))
        });
        let entries = entries.collect::<Vec<_>>().join(" ");
        let entries = if entries.is_empty() { "no process" } else { &entries };
        writeln!(text, "node allow {entries}")?;
        packets.reason.map_or(Ok(()), |reason| writeln!(text, "{:<10} calls only: {reason}", ""))
    }

    fn interfaces_table(&self) -> Table {
        let mut table = Table::new();
        table.load_style(NOTHING);
        let has_pods = self.interfaces.iter().any(|interface| interface.pod.is_some());
        let mut header =
            vec!["INTERFACE", "INDEX", "ROLE", "ATTACHED", "DENIED", "AUDITED", "ALLOWED", "EXEMPT"];
        // Only scoped exemptions need the column.
        let verdicts = if self.total.redirected.packets > 0 { 5 } else { 4 };
        header.extend((verdicts == 5).then_some("REDIRECTED"));
        header.extend(has_pods.then_some("POD"));
        table.set_header(header);
        for interface in &self.interfaces {
            let attachments: Vec<_> = interface.attachments.iter().map(phrase_attachment).collect();
            let attachments = if attachments.is_empty() { "-".to_owned() } else { attachments.join("; ") };
            let known = [
                interface.name.clone(),
                interface.ifindex.to_string(),
                interface.role.to_owned(),
                attachments,
            ];
            let pod = interface.pod.as_ref().map(Cell::new);
            table.add_row(
                known.map(Cell::new).into_iter().chain(cells(&interface.counts, verdicts)).chain(pod),
            );
        }
        let mut row = |title: &str, attached: String, counts: Vec<Cell>| {
            let known = [title.to_owned(), String::new(), String::new(), attached];
            table.add_row(known.map(Cell::new).into_iter().chain(counts));
        };
        if let Some(sockets) = &self.sockets {
            row("(sockets)", phrase_programs(&sockets.programs), calls(&sockets.counts, verdicts));
        }
        if let Some(local) = self.local_service.filter(|local| local.desired || local.attached) {
            let attached = if local.attached { "cgroup" } else { "-" };
            row("(local_service)", attached.to_owned(), cells(&local.counts, verdicts));
        }
        if let Some(hosts) = &self.host_network {
            row("(host_network)", phrase_programs(&hosts.programs), calls(&hosts.counts, verdicts));
        }
        if let Some(node) = &self.node_allow {
            row("(node_allow)", phrase_programs(&node.programs), calls(&node.counts, verdicts));
        }
        row("(deleted)", String::new(), cells(&self.deleted, verdicts));
        row("total", String::new(), cells(&self.total, verdicts));
        table
    }
}

/// Formats an attachment as `from_pod tcx`, with `not first` if other programs run before it.
fn phrase_attachment(attachment: &HookAttachment) -> String {
    let HookAttachment { hook, attach_mode, order, pending } = attachment;
    match (attach_mode, order) {
        (Some(mode), Some("first")) => format!("{hook} {mode}"),
        (Some(mode), _) => format!("{hook} {mode}, not first"),
        (None, _) if *pending => format!("{hook} pending"),
        (None, _) => format!("{hook} not enforced"),
    }
}

/// Formats the programs of a cgroup hook: `cgroup` if all are attached, `-` if none is. Names the missing ones otherwise.
fn phrase_programs(programs: &[ProgramState]) -> String {
    let mut cgroups: BTreeMap<u64, Vec<&str>> = BTreeMap::new();
    for program in programs {
        let missing = cgroups.entry(program.cgroup).or_default();
        missing.extend((!program.is_attached).then_some(program.program));
    }
    if programs.iter().all(|program| !program.is_attached) {
        return "-".to_owned();
    }
    let all = if cgroups.len() == 1 { "cgroup".to_owned() } else { format!("{} cgroups", cgroups.len()) };
    let without = |(id, missing): (&u64, &Vec<&str>)| {
        let at = if cgroups.len() == 1 { String::new() } else { format!("cgroup {id} ") };
        format!("{at}without {}", missing.join(" "))
    };
    let incomplete = cgroups.iter().filter(|(_, missing)| !missing.is_empty()).map(without);
    std::iter::once(all).chain(incomplete).collect::<Vec<_>>().join(", ")
}

/// Returns the counts of the first `verdicts` verdicts.
fn cells(counts: &Counts, verdicts: usize) -> Vec<Cell> {
    let counts = counts.named().into_iter().take(verdicts);
    counts.map(|(_, count)| Cell::new(phrase(count)).set_alignment(CellAlignment::Left)).collect()
}

fn calls(counts: &Counts, verdicts: usize) -> Vec<Cell> {
    let counts = counts.named().into_iter().take(verdicts);
    let cell = |(_, Count { packets, bytes }): (&str, Count)| {
        Cell::new(match (packets, bytes) {
            (0, _) => "0".to_owned(),
            (1, 0) => "1 call".to_owned(),
            (calls, 0) => format!("{calls} calls"),
            // host_network counts calls and packets in one counter.
            (both, bytes) => format!("{both} calls and packets, {bytes} bytes"),
        })
    };
    counts.map(cell).collect()
}

fn phrase(Count { packets, bytes }: Count) -> String {
    match packets {
        0 => "0".to_owned(),
        1 => format!("1 packet, {bytes} bytes"),
        _ => format!("{packets} packets, {bytes} bytes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partly_attached_hooks_name_the_missing_programs() {
        let programs = |states: &[(&'static str, u64, bool)]| {
            let program = |&(program, cgroup, is_attached)| ProgramState {
                program,
                cgroup,
                is_sendmsg: false,
                is_peer: false,
                is_attached,
                is_packet_program: false,
                problem: None,
            };
            phrase_programs(&states.iter().map(program).collect::<Vec<_>>())
        };
        assert_eq!(programs(&[]), "-");
        assert_eq!(programs(&[("a", 1, false), ("b", 1, false)]), "-");
        assert_eq!(programs(&[("a", 1, true), ("b", 1, true)]), "cgroup");
        assert_eq!(programs(&[("a", 1, true), ("b", 1, false)]), "cgroup, without b");
        assert_eq!(programs(&[("a", 1, true), ("a", 2, true)]), "2 cgroups");
        assert_eq!(
            programs(&[
                ("a", 1, true),
                ("b", 1, false),
                ("a", 2, true),
                ("b", 2, true),
                ("a", 3, false),
                ("b", 3, false)
            ]),
            "3 cgroups, cgroup 1 without b, cgroup 3 without a b"
        );
    }
}
