//! Report of `imds-agent doctor`, as JSON and as a table. docs/json.md describes the fields.

use std::{
    fmt::{self, Write as _},
    net::IpAddr,
    path::PathBuf,
};

use comfy_table::{Table, presets::NOTHING};
use serde::Serialize;
use strum::AsRefStr;

use crate::escape::escape;

#[derive(Debug, Serialize)]
pub(crate) struct DoctorReport {
    pub(crate) schema: u32,
    pub(crate) version: &'static str,
    pub(crate) pin_dir: PathBuf,
    pub(crate) ready: bool,
    pub(crate) checks: Vec<DoctorCheck>,
}

/// Result of one check, with its consequence and remedy.
#[derive(Clone, Debug, Serialize)]
pub struct DoctorCheck {
    pub(crate) name: &'static str,
    pub(crate) state: State,
    pub(crate) observed: String,
    pub(crate) remedy: Option<String>,
    pub(crate) program: Option<Program>,
    /// Firewall rule, if the check is about one.
    pub rule: Option<Rule>,
}

#[derive(AsRefStr, Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
#[strum(serialize_all = "lowercase")]
pub(crate) enum State {
    /// The check found no problem.
    Ok,
    /// Enforcement works, with the consequence that [`DoctorCheck::remedy`] describes.
    Degraded,
    /// A feature that enforcement needs is not available.
    Missing,
}

/// Program of another owner at a hook that the agent uses.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Program {
    pub(crate) name: Option<String>,
    pub(crate) id: Option<u32>,
    pub(crate) kind: String,
    pub(crate) at: String,
    pub(crate) hook: &'static str,
    pub(crate) position: usize,
    pub(crate) count: usize,
    pub(crate) first: Option<bool>,
}

/// Firewall rule of another owner for a metadata service.
#[derive(Clone, Debug, Serialize)]
pub struct Rule {
    pub(crate) table: String,
    pub(crate) chain: String,
    pub(crate) text: String,
    pub(crate) origin: &'static str,
    /// Address of the metadata service.
    pub address: IpAddr,
    /// True if the agent denies packets that the rule would redirect.
    pub conflicts: bool,
    /// True if imds-agent denies everything that the rule denies, so that the rule can be removed.
    pub removable: bool,
    /// Traffic that opens if the rule is removed, because the agent does not deny it.
    pub opens: Vec<String>,
    pub(crate) remove: String,
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
        Self { name, state: State::Ok, observed: observed.into(), remedy: None, program: None, rule: None }
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
    pub(crate) fn table(&self) -> String {
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
