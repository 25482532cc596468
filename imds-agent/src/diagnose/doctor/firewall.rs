//! Explains firewall rules of other owners for metadata services: the purpose of each, and the traffic that opens if it is
//! removed. Changes no rule.

#[cfg(test)]
mod tests;

use std::{collections::BTreeSet, net::IpAddr};

use super::{
    chains::{BaseHook, Chains},
    coverage::Enforcement,
    doctor_report::{DoctorCheck, Rule, or_ok},
    rulesets::{ListedRule, Rulesets},
    traffic::{Action, Branch, Traffic},
};
use crate::config::provider::{EXTRAS, PROVIDERS, Provider};

const NAME: &str = "firewall_rules";
/// Ports of kube2iam and kiam.
const KUBE2IAM_PORTS: [&str; 2] = [":8181", ":8180"];
/// Ports of GKE's metadata server.
const GKE_PORTS: [&str; 2] = [":988", ":987"];

#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Effect {
    Deny,
    /// Redirects to another address or port.
    Redirect,
    Accept,
    Other,
}

/// A firewall rule that matches a metadata service.
struct Finding<'a> {
    rule: &'a ListedRule,
    /// Address of the metadata service. Protected addresses take precedence.
    address: IpAddr,
    effect: Effect,
    /// The branch with this effect that reaches the address.
    branch: &'a Branch,
    hooks: BTreeSet<BaseHook>,
    /// Traffic that opens if the rule is removed.
    opens: Vec<String>,
}

/// Explains the rules for an address of any provider, or of this configuration.
pub(crate) fn rules(rulesets: &Rulesets, enforcement: &Enforcement) -> Vec<DoctorCheck> {
    let (chains, known) = (rulesets.chains(), presets());
    let findings = rulesets.rules.iter().filter_map(|rule| Finding::new(rule, &chains, &known, enforcement));
    let checks = findings.map(|finding| finding.check(enforcement));
    or_ok(checks, NAME, rulesets.none("none for a metadata service"))
}

fn presets() -> BTreeSet<IpAddr> {
    let endpoints = PROVIDERS.iter().chain(EXTRAS).flat_map(Provider::endpoints);
    endpoints.map(|endpoint| endpoint.address).collect()
}

/// Returns the first of the `known` addresses that the traffic reaches, protected ones first; `None` for traffic to all
/// addresses.
fn address(traffic: &Traffic, known: &BTreeSet<IpAddr>, enforcement: &Enforcement) -> Option<IpAddr> {
    let ranges = traffic.destinations.as_ref()?;
    let is_for = |address: &IpAddr| {
        ranges.iter().any(|range| range.contains(*address) && !range.is_about_everything())
    };
    enforcement.endpoints.keys().chain(known).copied().find(is_for)
}

impl<'a> Finding<'a> {
    /// Returns `None` for a rule that matches no metadata service.
    fn new(
        rule: &'a ListedRule,
        chains: &Chains,
        known: &BTreeSet<IpAddr>,
        enforcement: &Enforcement,
    ) -> Option<Self> {
        let effect = |branch: &Branch| match &branch.action {
            Action::Deny => Effect::Deny,
            Action::Redirect(_) => Effect::Redirect,
            Action::Accept => Effect::Accept,
            jump if rule.leads_to_denial(jump, chains) => Effect::Deny,
            Action::Jump(_) | Action::Other => Effect::Other,
        };
        let about = rule.branches.iter().filter_map(|branch| {
            let address = address(&branch.traffic, known, enforcement)?;
            Some((effect(branch), !enforcement.endpoints.contains_key(&address), address, branch))
        });
        let (effect_found, _, address, branch) =
            about.min_by_key(|&(effect, is_unprotected, ..)| (is_unprotected, effect))?;
        let hooks = chains.hooks(&rule.chain);
        let mut opens = Vec::new();
        let denying = rule.branches.iter().filter(|&branch| effect(branch) <= Effect::Redirect);
        for opening in
            denying.flat_map(|branch| enforcement.openings(&branch.traffic, &hooks, &rule.chain.name))
        {
            if !opens.contains(&opening) {
                opens.push(opening);
            }
        }
        Some(Self { rule, address, effect: effect_found, branch, hooks, opens })
    }

    /// Returns the probable owner of the rule, and its purpose.
    fn origin(&self) -> (&'static str, &'static str) {
        let Branch { traffic, action } = self.branch;
        let chain = &*self.rule.chain.name;
        let leads_to = |ports: &[&str]| matches!(action, Action::Redirect(to) if ports.iter().any(|port| to.ends_with(port)));
        match self.effect {
            Effect::Deny
                if traffic.has_negated_source && chain == "FORWARD" && traffic.services() == "tcp/80" =>
            {
                ("aks", "IMDS restriction of AKS: drops forwarded packets to TCP port 80")
            }
            Effect::Deny if traffic.interface == "eni+" => (
                "eks",
                "eksctl's disablePodIMDS, or a rule that AWS recommends for EKS: drops packets of pods of the VPC CNI",
            ),
            Effect::Deny if chain == "DOCKER-USER" || traffic.interface.starts_with("docker") => {
                ("docker", "rule that AWS recommends for ECS: drops packets of Docker's containers")
            }
            Effect::Redirect if self.address == IpAddr::from([169, 254, 170, 2]) => {
                ("ecs", "ECS agent: redirects to its own endpoint for task credentials")
            }
            Effect::Redirect if leads_to(&KUBE2IAM_PORTS) => {
                ("kube2iam", "kube2iam or kiam: redirects pods to its proxy")
            }
            Effect::Redirect if leads_to(&GKE_PORTS) => {
                ("gke", "Workload Identity of GKE: redirects pods to its metadata server")
            }
            Effect::Deny => ("other", "denies packets"),
            Effect::Redirect => ("other", "redirects packets"),
            Effect::Accept => ("other", "accepts packets"),
            Effect::Other => ("other", "neither denies nor accepts packets"),
        }
    }

    /// Reports whether imds-agent denies packets that the rule would redirect.
    fn conflicts(&self, enforcement: &Enforcement) -> bool {
        self.effect == Effect::Redirect
            && (self.matches_denied_pods(enforcement) || self.restriction_of_node(enforcement).is_some())
    }

    /// Reports whether the rule matches packets of pods that imds-agent denies.
    fn matches_denied_pods(&self, enforcement: &Enforcement) -> bool {
        self.hooks.iter().any(|hook| hook.sees_pods())
            && enforcement.denies_all_to(self.address, &self.branch.traffic)
    }

    /// Describes the node's own processes that the rule matches and imds-agent denies, if an allow list restricts them.
    fn restriction_of_node(&self, enforcement: &Enforcement) -> Option<String> {
        enforcement.restriction_of_node(self.address, &self.branch.traffic, &self.hooks)
    }

    fn remedy(&self, origin: &str, enforcement: &Enforcement) -> String {
        let (remove, address) = (&self.rule.remove, self.address);
        let opens = self.opens.join("; ");
        let node = self.restriction_of_node(enforcement);
        match self.effect {
            Effect::Deny if !self.opens.is_empty() => {
                format!(
                    "keep the rule: imds-agent does not deny everything that it denies. If it is removed, this traffic passes: \
                     {opens}. Command that removes the rule: {remove}"
                )
            }
            Effect::Deny if origin == "aks" => format!(
                "no conflict: imds-agent denies everything that the rule denies. Once `imds-agent verify` passes, it can be \
                 removed with `az aks update --disable-imds-restriction` and a node image upgrade; until then the kubelet \
                 restores it after: {remove}"
            ),
            Effect::Deny => {
                let node = node.map(|node| format!(", also {node}")).unwrap_or_default();
                format!(
                    "no conflict: imds-agent denies everything that the rule denies{node}. Once `imds-agent verify` passes, it \
                     can be removed: {remove}"
                )
            }
            Effect::Redirect if self.conflicts(enforcement) => {
                let opens = if opens.is_empty() { opens } else { format!(", which opens: {opens}") };
                match node.filter(|_| !self.matches_denied_pods(enforcement)) {
                    Some(node) => format!(
                        "conflict: imds-agent denies {node} before this rule redirects them. Add the processes that need the redirection to \
                         node.allow, leave {address} unprotected, or remove the rule: {remove}{opens}"
                    ),
                    None => format!(
                        "conflict: imds-agent denies pods before this rule redirects them. Exempt the pods that need the \
                         redirection, leave {address} unprotected, or remove the rule: {remove}{opens}"
                    ),
                }
            }
            Effect::Redirect => {
                let opens = if opens.is_empty() { "nothing".to_owned() } else { opens };
                format!(
                    "no conflict. If the rule is removed ({remove}), this traffic passes without redirection: {opens}"
                )
            }
            Effect::Accept | Effect::Other => match (enforcement.not_enforcing_reason(), node) {
                (Some(reason), _) => format!("{reason}. Command that removes the rule: {remove}"),
                (None, Some(node)) if self.effect == Effect::Accept => format!(
                    "imds-agent denies {node}, although this rule accepts their packets: add those that need {address} to node.allow. Command \
                     that removes the rule: {remove}"
                ),
                (None, _) if enforcement.endpoints.contains_key(&address) => format!(
                    "no conflict: imds-agent decides independently of this rule. Command that removes the rule: {remove}"
                ),
                (None, _) => {
                    format!("imds-agent does not protect {address}. Command that removes the rule: {remove}")
                }
            },
        }
    }

    fn check(self, enforcement: &Enforcement) -> DoctorCheck {
        let (origin, purpose) = self.origin();
        let remedy = self.remedy(origin, enforcement);
        let conflicts = self.conflicts(enforcement);
        let ListedRule { chain, text, remove, .. } = self.rule;
        let observed = format!("{text}: {purpose}");
        let rule = Rule {
            table: chain.table.clone(),
            chain: chain.name.clone(),
            text: text.clone(),
            origin,
            address: self.address,
            conflicts,
            removable: self.effect == Effect::Deny && self.opens.is_empty(),
            opens: self.opens,
            remove: remove.clone(),
        };
        DoctorCheck { rule: Some(rule), ..DoctorCheck::degraded(NAME, observed, remedy) }
    }
}
