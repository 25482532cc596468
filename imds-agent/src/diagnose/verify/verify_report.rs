//! Results of the checks, and the report. docs/json.md describes the fields.

use std::{fmt::Write as _, net::IpAddr, path::PathBuf};

use comfy_table::{Table, presets::NOTHING};
use imds_ebpf_common::{Hook, Verdict};
use serde::Serialize;
use strum::AsRefStr;

use crate::{
    config::endpoint_set::{AllowedPort, Endpoint},
    escape::escape,
};

#[derive(Debug, Serialize)]
pub(crate) struct VerifyReport {
    pub schema: u32,
    pub version: &'static str,
    pub pin_dir: PathBuf,
    pub mode: &'static str,
    pub passed: bool,
    pub checks: Vec<VerifyCheck>,
}

/// Result of one check, with its expectation.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct VerifyCheck {
    pub hook: &'static str,
    pub sender: Option<String>,
    pub endpoint: Option<String>,
    pub address: Option<IpAddr>,
    pub service: Option<String>,
    pub expected: &'static str,
    pub observed: String,
    pub outcome: Outcome,
}

#[derive(AsRefStr, Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
#[strum(serialize_all = "lowercase")]
pub(crate) enum Outcome {
    Passed,
    Failed,
    Skipped,
}

/// Reason why a check can't run, with the outcome of that check.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Skip {
    pub(crate) reason: String,
    pub(crate) outcome: Outcome,
}

impl Skip {
    /// Creates the reason of a skipped check, which does not concern enforcement.
    pub(crate) fn new(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), outcome: Outcome::Skipped }
    }

    /// Creates the reason of a failed check: a hook is not enforced.
    pub(crate) fn failed(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), outcome: Outcome::Failed }
    }
}

impl Outcome {
    pub(crate) const fn from_success(is_right: bool) -> Self {
        if is_right { Self::Passed } else { Self::Failed }
    }
}

impl VerifyCheck {
    pub(crate) fn new(
        hook: &'static str,
        expected: &'static str,
        observed: impl Into<String>,
        outcome: Outcome,
    ) -> Self {
        Self {
            hook,
            sender: None,
            endpoint: None,
            address: None,
            service: None,
            expected,
            observed: observed.into(),
            outcome,
        }
    }

    pub(crate) fn skipped(hook: &'static str, expected: &'static str, skip: &Skip) -> Self {
        Self::new(hook, expected, &*skip.reason, skip.outcome)
    }

    /// Creates the check that all programs of a cgroup hook are attached.
    pub(crate) fn attached(hook: Hook, is_attached: bool) -> Self {
        let observed = if is_attached { "attached" } else { "not all attached: see `imds-agent status`" };
        Self::new(hook.name(), "all programs attached", observed, Outcome::from_success(is_attached))
    }

    pub(crate) fn with_sender(self, sender: impl Into<String>) -> Self {
        Self { sender: Some(sender.into()), ..self }
    }

    pub(crate) fn with_endpoint(self, endpoint: &Endpoint) -> Self {
        Self { endpoint: Some(endpoint.name.clone()), address: Some(endpoint.address), ..self }
    }

    pub(crate) fn with_service(self, service: Option<AllowedPort>) -> Self {
        Self { service: service.map(|service| service.to_string()), ..self }
    }
}

pub(crate) fn is_passed(checks: &[VerifyCheck]) -> bool {
    let has = |outcome| checks.iter().any(|check| check.outcome == outcome);
    has(Outcome::Passed) && !has(Outcome::Failed)
}

impl VerifyReport {
    /// Returns the report as text that ends with a newline.
    pub(crate) fn table(&self) -> String {
        let mut table = Table::new();
        table.load_style(NOTHING);
        table.set_header(["HOOK", "SENDER", "ENDPOINT", "ADDRESS", "EXPECTED", "OBSERVED", "RESULT"]);
        for check in &self.checks {
            let address = check.address.map_or_else(|| "-".to_owned(), |address| address.to_string());
            let service = check.service.as_ref().map(|service| format!(" {service}")).unwrap_or_default();
            table.add_row([
                check.hook,
                &escape(check.sender.as_deref().unwrap_or("-")),
                check.endpoint.as_deref().unwrap_or("-"),
                &format!("{address}{service}"),
                check.expected,
                &escape(&check.observed),
                check.outcome.as_ref(),
            ]);
        }
        let mut text = String::new();
        let count = |outcome| self.checks.iter().filter(|check| check.outcome == outcome).count();
        let [passed, failed, skipped] = [Outcome::Passed, Outcome::Failed, Outcome::Skipped].map(count);
        let sum =
            format!("{} checks: {passed} passed, {failed} failed, {skipped} skipped", self.checks.len());
        // Writing to a string does not fail.
        let _ok = writeln!(text, "mode {}\n\n{}\n\n{sum}", self.mode, table.trim_fmt());
        text
    }
}

/// Describes a verdict; `None` if no packet or call was counted.
pub(crate) const fn phrase(verdict: Option<Verdict>) -> &'static str {
    match verdict {
        None | Some(Verdict::Unrelated) => "no verdict",
        Some(Verdict::Denied) => "denied",
        Some(Verdict::Audited) => "not denied, counted as audited",
        Some(Verdict::Off) => "not denied, counted as allowed",
        Some(Verdict::Allowed) => "not denied, an allowed port",
        Some(Verdict::Exempt) => "not denied, counted as exempt",
        Some(Verdict::Redirected) => "not denied, counted as redirected",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn skipped_checks_prove_nothing() {
        let checks = |outcomes: &[Outcome]| -> Vec<_> {
            outcomes.iter().map(|&outcome| VerifyCheck::new("path", "", "", outcome)).collect()
        };
        assert!(is_passed(&checks(&[Outcome::Passed, Outcome::Skipped])));
        assert!(!is_passed(&checks(&[Outcome::Skipped])));
        assert!(!is_passed(&checks(&[Outcome::Passed, Outcome::Failed])));
        assert!(!is_passed(&[]));
    }
}
