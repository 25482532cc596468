//! The report.

use std::{fmt::Write as _, net::IpAddr, path::PathBuf};

use comfy_table::{Table, presets::NOTHING};
use imds_ebpf_common::{Hook, Verdict};
use serde::Serialize;

use crate::endpoints::{Endpoint, Keep};

/// The whole of it.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Version of this form: within one, fields are only added.
    pub schema: u32,
    /// Version of the program that made the report.
    pub version: &'static str,
    /// The pin directory.
    pub pin_dir: PathBuf,
    /// The mode in force.
    pub mode: &'static str,
    /// Whether all of it was proven.
    pub held: bool,
    /// What was tried.
    pub checks: Vec<Check>,
}

/// One proof.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// The hook, or `node` for what the node itself may do.
    pub hook: &'static str,
    /// Name of the endpoint; `None` where it is about all of them.
    pub endpoint: Option<String>,
    /// Its address.
    pub address: Option<IpAddr>,
    /// The kept service that it is about, such as `udp/53`.
    pub service: Option<String>,
    /// What should become of it.
    pub expected: &'static str,
    /// What became of it.
    pub found: String,
    /// Whether that is as it should be.
    pub ok: bool,
    /// The same in more words.
    pub result: Outcome,
}

/// What a proof came to.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It is as it should be.
    Proven,
    /// It is not.
    Failed,
    /// It could not be tried.
    Unproven,
}

impl Outcome {
    pub(super) const fn of(is_right: bool) -> Self {
        if is_right { Self::Proven } else { Self::Failed }
    }
}

impl Check {
    /// A check of a hook as a whole.
    pub(super) fn of_hook(
        hook: &'static str,
        expected: &'static str,
        found: impl Into<String>,
        result: Outcome,
    ) -> Self {
        let ok = result == Outcome::Proven;
        Self { hook, endpoint: None, address: None, service: None, expected, found: found.into(), ok, result }
    }

    /// Whether all programs of a hook on cgroups are attached.
    pub(super) fn attached(hook: Hook, is_attached: bool) -> Self {
        let found = if is_attached { "attached" } else { "not all are: `imds-agent status` names them" };
        Self::of_hook(hook.name(), "all programs attached", found, Outcome::of(is_attached))
    }

    /// The same of an endpoint.
    pub(super) fn at(self, endpoint: &Endpoint) -> Self {
        Self { endpoint: Some(endpoint.name.clone()), address: Some(endpoint.address), ..self }
    }

    /// The same of a service that is kept there.
    pub(super) fn with_service(self, service: Option<Keep>) -> Self {
        Self { service: service.map(|service| service.to_string()), ..self }
    }
}

impl Report {
    /// The report as text that ends with a newline.
    #[must_use]
    pub fn table(&self) -> String {
        let mut table = Table::new();
        table.load_style(NOTHING);
        table.set_header(["HOOK", "ENDPOINT", "ADDRESS", "EXPECTED", "FOUND", "OK"]);
        for check in &self.checks {
            let address = check.address.map_or_else(|| "-".to_owned(), |address| address.to_string());
            let service = check.service.as_ref().map(|service| format!(" {service}")).unwrap_or_default();
            table.add_row([
                check.hook,
                check.endpoint.as_deref().unwrap_or("-"),
                &format!("{address}{service}"),
                check.expected,
                &check.found,
                check.result.name(),
            ]);
        }
        let mut text = String::new();
        let count = |result| self.checks.iter().filter(|check| check.result == result).count();
        let [failed, unproven] = [Outcome::Failed, Outcome::Unproven].map(count);
        let sum = if self.held {
            format!("all {} checks hold", self.checks.len())
        } else {
            format!("of {} checks, {failed} failed and {unproven} could not be made", self.checks.len())
        };
        // Writing to a string does not fail.
        let _ok = writeln!(text, "mode {}\n\n{}\n\n{sum}", self.mode, table.trim_fmt());
        text
    }
}

impl Outcome {
    const fn name(self) -> &'static str {
        match self {
            Self::Proven => "yes",
            Self::Failed => "no",
            Self::Unproven => "not proven",
        }
    }
}

/// A verdict in words; `None` where nothing was counted.
pub(super) const fn phrase(verdict: Option<Verdict>) -> &'static str {
    match verdict {
        None | Some(Verdict::Foreign) => "not judged",
        Some(Verdict::Deny) => "denied",
        Some(Verdict::Audit) => "let through, counted as audited",
        Some(Verdict::Allow) => "let through, counted as allowed",
        Some(Verdict::Kept) => "let through, counted as kept",
        Some(Verdict::Exempt) => "let through, counted as exempt",
    }
}
