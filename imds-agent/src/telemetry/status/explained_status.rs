//! Adds the explained denials to the status report: `on_deny = "explain"`.

use std::collections::{BTreeMap, BTreeSet};

use imds_ebpf_common::{
    DenyAction, ExemptionKey, Hook, Mode, Policy, RedirectRecord, redirect::MAX_LISTENERS,
};

use super::{ExplainedReport, StatusReport};
use crate::{
    config::{Hooks, provider},
    node::netns::{self, OwnNetns},
};

impl StatusReport {
    /// Adds the listeners among `redirects` that explain denials. Needs the report's provider, agent and sockets.
    pub(super) fn add_explained(&mut self, redirects: &BTreeMap<ExemptionKey, RedirectRecord>) {
        if self.on_deny != Some(DenyAction::Explain.name()) {
            return;
        }
        let explains = redirects.iter().filter(|(_, record)| record.rule == RedirectRecord::EXPLAINS);
        let cookies: BTreeSet<_> = explains.map(|(key, _)| key.subject.id).collect();
        let provider = self.provider.as_ref().map_or("", |provider| provider.effective.as_str());
        let reason = obstacle(self.mode, self.hooks.contains(&Hook::Socket.name()), provider);
        let of_agent = || match &self.sockets {
            _ if !self.agent.running => Some("no agent is running"),
            Some(sockets) if !sockets.attached => Some("the socket hook is not attached"),
            Some(_) | None if redirects.len() >= MAX_LISTENERS => Some(
                "the largest number of listeners is reached, further pods are answered as with \"reject\"",
            ),
            Some(_) | None => None,
        };
        self.explained = Some(ExplainedReport { pods: cookies.len(), reason: reason.or_else(of_agent) });
    }
}

/// Returns the reason why denials on this node are never explained, if there is one.
fn obstacle(mode: Option<&str>, has_socket_hook: bool, provider: &str) -> Option<&'static str> {
    if mode != Some(Mode::Enforce.name()) {
        return Some("the mode denies nothing");
    }
    if !has_socket_hook {
        return Some("hooks.socket is false");
    }
    if !matches!(netns::identity(), Ok(Some(OwnNetns::Cookie(_)))) {
        return Some("needs Linux 5.14");
    }
    let has_http =
        provider::Provider::named(provider).is_some_and(|found| !found.http_addresses().is_empty());
    (!has_http).then_some("the provider has no metadata service at HTTP port 80")
}

/// Returns the line of `imds-agent doctor` about explained denials, if the policy has them.
pub(crate) fn describe(policy: &Policy, provider: &str) -> Option<String> {
    if DenyAction::from_u32(policy.on_deny) != DenyAction::Explain {
        return None;
    }
    let has_socket_hook = Hooks::from_bits(policy.hooks).contains(Hook::Socket);
    Some(match obstacle(Some(Mode::from_u32(policy.mode).name()), has_socket_hook, provider) {
        Some(reason) => format!("explain, answered as with \"reject\": {reason}"),
        None => "explain: `imds-agent status` shows how many pods get a reason".to_owned(),
    })
}

impl ExplainedReport {
    /// Returns the text after the name of the action.
    pub(super) fn text(&self) -> String {
        match (self.pods, self.reason) {
            (0, Some(reason)) => format!(", answered as with \"reject\": {reason}"),
            (pods, reason) => {
                let noun = if pods == 1 { "pod" } else { "pods" };
                let reason = reason.map(|reason| format!(", {reason}")).unwrap_or_default();
                format!(", {pods} {noun}{reason}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn obstacles_are_named() {
        let enforce = Some(Mode::Enforce.name());
        assert_eq!(obstacle(Some("audit"), true, "aws"), Some("the mode denies nothing"));
        assert_eq!(obstacle(enforce, false, "aws"), Some("hooks.socket is false"));
        if matches!(netns::identity(), Ok(Some(OwnNetns::Cookie(_)))) {
            for (provider, is_explained) in
                [("aws", true), ("azure", true), ("generic", true), ("equinix", false), ("none", false)]
            {
                assert_eq!(obstacle(enforce, true, provider).is_none(), is_explained, "{provider}");
            }
        }
    }
}
