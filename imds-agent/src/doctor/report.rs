//! The report.

use std::{
    fmt::{self, Write as _},
    net::IpAddr,
    path::PathBuf,
};

use comfy_table::{Table, presets::NOTHING};
use serde::Serialize;

use crate::escape::escape;

/// The whole of it.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Version of this form: within one, fields are only added.
    pub schema: u32,
    /// Version of the program that made the report.
    pub version: &'static str,
    /// The pin directory.
    pub pin_dir: PathBuf,
    /// Whether nothing is missing that enforcement needs.
    pub ready: bool,
    /// What was looked at.
    pub checks: Vec<Check>,
}

/// One thing that was looked at.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// What it is.
    pub name: &'static str,
    /// How it is.
    pub state: State,
    /// What was found.
    pub found: String,
    /// What to do, or what comes of it; `None` where it is [`State::Ok`].
    pub remedy: Option<String>,
    /// The program that it is about, if it is about one.
    pub program: Option<Program>,
    /// The firewall rule that it is about, if it is about one.
    pub rule: Option<Rule>,
    /// The rule or TC action that writes the mark bit, if the check is about one.
    pub mark: Option<MarkWriter>,
}

/// How it is.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// As it should be.
    Ok,
    /// Good enough, with a consequence.
    Degraded,
    /// Enforcement needs it.
    Missing,
}

/// Somebody else's program at a hook of ours.
#[derive(Clone, Debug, Serialize)]
pub struct Program {
    /// Its name, where the kernel tells.
    pub name: Option<String>,
    /// Its id; `None` for a filter that is no BPF program.
    pub id: Option<u32>,
    /// Kind of attachment: `tcx`, `netkit`, `xdp`, `cgroup` or the kind of filter.
    pub kind: String,
    /// The interface, or the path of the cgroup.
    pub at: String,
    /// The hook there, such as `ingress` or `connect4`.
    pub hook: &'static str,
    /// Its place among the programs of the hook, from 1.
    pub place: usize,
    /// How many there are, the agent's own included.
    pub of: usize,
    /// Whether it runs before the agent's; `None` where that has none there.
    pub is_first: Option<bool>,
}

/// Somebody's firewall rule for a metadata service.
#[derive(Clone, Debug, Serialize)]
pub struct Rule {
    /// Its table.
    pub table: String,
    /// Its chain.
    pub chain: String,
    /// What would add it, or names it.
    pub text: String,
    /// Whose it looks like: `aks`, `eks`, `docker`, `kube2iam`, `ecs`, `gke` or `other`.
    pub origin: &'static str,
    /// The metadata service that it is about.
    pub address: IpAddr,
    /// Whether the agent keeps it from doing what it is for.
    pub conflicts: bool,
    /// True if the rule denies nothing that imds-agent lets pass, so that it can be removed.
    pub removable: bool,
    /// Traffic that opens if the rule is removed: the agent does not deny it.
    pub opens: Vec<String>,
    /// The command that removes it.
    pub remove: String,
}

/// A rule of a firewall or a TC action that writes the mark bit of the configuration.
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
        let Self { name, id, kind, at, hook, place, of, is_first } = self;
        write!(formatter, "{kind} {}", name.as_deref().unwrap_or("(no name)"))?;
        if let Some(id) = id {
            write!(formatter, " (id {id})")?;
        }
        write!(formatter, " at {hook} of {at}, place {place} of {of}")?;
        match is_first {
            Some(true) => formatter.write_str(", before the agent's"),
            Some(false) => formatter.write_str(", after the agent's"),
            None => Ok(()),
        }
    }
}

impl Check {
    pub(super) fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self {
            name,
            state: State::Ok,
            found: found.into(),
            remedy: None,
            program: None,
            rule: None,
            mark: None,
        }
    }

    pub(super) fn degraded(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { state: State::Degraded, remedy: Some(remedy.into()), ..Self::ok(name, found) }
    }

    pub(super) fn missing(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { state: State::Missing, ..Self::degraded(name, found, remedy) }
    }
}

impl Report {
    /// The report as text that ends with a newline.
    #[must_use]
    pub fn table(&self) -> String {
        let mut table = Table::new();
        table.load_style(NOTHING);
        table.set_header(["CHECK", "STATE", "FOUND"]);
        for check in &self.checks {
            table.add_row([check.name, check.state.name(), &escape(&check.found)]);
        }
        let mut text = format!("{}\n", table.trim_fmt());
        let remedies: Vec<_> =
            self.checks.iter().filter_map(|check| Some((check.name, check.remedy.as_ref()?))).collect();
        if !remedies.is_empty() {
            text.push_str("\nwhat comes of it, and what to do:\n");
        }
        for (name, remedy) in remedies {
            // Writing to a string does not fail.
            let _ok = writeln!(text, "  {name}: {}", escape(remedy));
        }
        text
    }
}

impl State {
    const fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Degraded => "degraded",
            Self::Missing => "missing",
        }
    }
}
