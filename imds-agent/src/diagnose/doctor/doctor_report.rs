//! Report of `imds-agent doctor`, as JSON and as a table.

use std::{
    fmt::{self, Write as _},
    net::IpAddr,
    path::PathBuf,
};

use comfy_table::{Table, presets::NOTHING};
use serde::Serialize;
use strum::AsRefStr;

use crate::escape::escape;

/// Report of one `imds-agent doctor`.
#[derive(Debug, Serialize)]
pub struct DoctorReport {
    /// Schema version. Removed and changed fields increase it.
    pub schema: u32,
    /// Version of the program that made the report.
    pub version: &'static str,
    /// Directory of the pinned maps, programs and links.
    pub pin_dir: PathBuf,
    /// True if no check has the state [`State::Missing`].
    pub ready: bool,
    /// Checks in the order in which they ran.
    pub checks: Vec<DoctorCheck>,
}

/// Result of one check, with its consequence and remedy.
#[derive(Clone, Debug, Serialize)]
pub struct DoctorCheck {
    /// Name of the check. Several results can have the same name, such as one for each firewall rule.
    pub name: &'static str,
    /// Result of the check in one word.
    pub state: State,
    /// Observed feature, program or rule.
    pub observed: String,
    /// Consequence, and how to fix it; `None` if the state is [`State::Ok`].
    pub remedy: Option<String>,
    /// Program of another owner, if the check is about one.
    pub program: Option<Program>,
    /// Firewall rule, if the check is about one.
    pub rule: Option<Rule>,
    /// Rule or TC action that writes the mark bit, if the check is about one.
    pub mark: Option<MarkWriter>,
}

/// Result of a check in one word.
#[derive(AsRefStr, Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
#[strum(serialize_all = "lowercase")]
pub enum State {
    /// The check found no problem.
    Ok,
    /// Enforcement works, with the consequence that [`DoctorCheck::remedy`] describes.
    Degraded,
    /// A feature that enforcement needs is not available.
    Missing,
}

/// Program of another owner at a hook that the agent uses.
#[derive(Clone, Debug, Serialize)]
pub struct Program {
    /// Name of the program, if the kernel reports one.
    pub name: Option<String>,
    /// Id of the program; `None` for a filter that is not a BPF program.
    pub id: Option<u32>,
    /// Kind of attachment: `tcx`, `netkit`, `xdp`, `cgroup` or the kind of filter.
    pub kind: String,
    /// Name of the interface, or path of the cgroup.
    pub at: String,
    /// Hook of the interface or cgroup, such as `ingress` or `connect4`.
    pub hook: &'static str,
    /// Position among the programs of the hook, from 1.
    pub position: usize,
    /// Number of programs of the hook, those of the agent included.
    pub count: usize,
    /// True if the program runs before the agent's; `None` if the agent has no program at the hook.
    pub first: Option<bool>,
}

/// Firewall rule of another owner for a metadata service.
#[derive(Clone, Debug, Serialize)]
pub struct Rule {
    /// Table of the rule, such as `mangle`.
    pub table: String,
    /// Chain of the rule, such as `FORWARD`.
    pub chain: String,
    /// Command that adds the rule, or the name of the rule.
    pub text: String,
    /// Probable owner: `aks`, `eks`, `docker`, `kube2iam`, `ecs`, `gke` or `other`.
    pub origin: &'static str,
    /// Address of the metadata service.
    pub address: IpAddr,
    /// True if the agent denies packets that the rule would redirect.
    pub conflicts: bool,
    /// True if imds-agent denies everything that the rule denies, so that the rule can be removed.
    pub removable: bool,
    /// Traffic that opens if the rule is removed, because the agent does not deny it.
    pub opens: Vec<String>,
    /// Command that removes the rule.
    pub remove: String,
}

/// Firewall rule or TC action that writes the mark bit of the configuration.
#[derive(Clone, Debug, Serialize)]
pub struct MarkWriter {
    /// Table of the rule; `None` for a TC action.
    pub table: Option<String>,
    /// Chain of the rule; `None` for a TC action.
    pub chain: Option<String>,
    /// Command that adds the rule, or the name of the rule.
    pub text: String,
    /// State of the bit afterwards: `set`, `cleared`, or `changed` if it depends on something else.
    pub effect: &'static str,
    /// Number of the bit, as in `hooks.mark_bit`.
    pub bit: u32,
}

impl fmt::Display for Program {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, id, kind, at, hook, position, count, first } = self;
        write!(formatter, "{kind} {}", name.as_deref().unwrap_or("(no name)"))?;
        if let Some(id) = id {
            write!(formatter, " (id {id})")?;
        }
        write!(formatter, " at {hook} of {at}, position {position} of {count}")?;
        match first {
            Some(true) => formatter.write_str(", before the agent's program"),
            Some(false) => formatter.write_str(", after the agent's program"),
            None => Ok(()),
        }
    }
}

impl DoctorCheck {
    pub(crate) fn ok(name: &'static str, observed: impl Into<String>) -> Self {
        Self {
            name,
            state: State::Ok,
            observed: observed.into(),
            remedy: None,
            program: None,
            rule: None,
            mark: None,
        }
    }

    pub(crate) fn degraded(
        name: &'static str,
        observed: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self { state: State::Degraded, remedy: Some(remedy.into()), ..Self::ok(name, observed) }
    }

    pub(crate) fn missing(
        name: &'static str,
        observed: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self { state: State::Missing, ..Self::degraded(name, observed, remedy) }
    }
}

/// Returns the checks, or one that found no problem if there are none.
pub(crate) fn or_ok(
    checks: impl IntoIterator<Item = DoctorCheck>,
    name: &'static str,
    observed: impl Into<String>,
) -> Vec<DoctorCheck> {
    let mut checks: Vec<_> = checks.into_iter().collect();
    if checks.is_empty() {
        checks.push(DoctorCheck::ok(name, observed));
    }
    checks
}

impl DoctorReport {
    /// Returns the report as text that ends with a newline.
    pub fn table(&self) -> String {
        let mut table = Table::new();
        table.load_style(NOTHING);
        table.set_header(["CHECK", "STATE", "OBSERVED"]);
        for check in &self.checks {
            table.add_row([check.name, check.state.as_ref(), &escape(&check.observed)]);
        }
        let mut text = format!("{}\n", table.trim_fmt());
        let remedies: Vec<_> =
            self.checks.iter().filter_map(|check| Some((check.name, check.remedy.as_ref()?))).collect();
        if !remedies.is_empty() {
            text.push_str("\nconsequences and remedies:\n");
        }
        for (name, remedy) in remedies {
            // Writing to a string does not fail.
            let _ok = writeln!(text, "  {name}: {}", escape(remedy));
        }
        text
    }
}
