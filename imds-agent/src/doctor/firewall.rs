//! Firewall rules of others for metadata services: what each does, and whether it gets along with the agent. They are only
//! listed; no rule is ever changed.

use std::{collections::BTreeSet, net::IpAddr};

use serde_json::Value;

use super::{
    report::{Check, Rule},
    rulesets::{Body, ListedRule, Rulesets},
};
use crate::{
    datapath::{endpoints, object::Maps, pins::PinDir},
    endpoints::plain,
    provider::{DMI_DIR, Dmi, EXTRAS, PROVIDERS, Provider},
};

const NAME: &str = "firewall_rules";
/// What kube2iam and kiam listen at.
const KUBE2IAM_PORTS: [&str; 2] = [":8181", ":8180"];
/// What GKE's metadata server listens at.
const GKE_PORTS: [&str; 2] = [":988", ":987"];

/// Where a rule says that packets go.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Target {
    Denied,
    /// To another address or port.
    Elsewhere,
    LetThrough,
    Other,
}

/// What a rule says of packets to an address.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
struct Match {
    table: String,
    chain: String,
    /// As it would be added.
    text: String,
    destination: Option<(IpAddr, u8)>,
    has_negated_source: bool,
    interface: String,
    port: String,
    target: String,
    /// Where to, for what readdresses.
    to: String,
    /// What removes it.
    remove: String,
}

/// Rules for an address of any provider, or of this configuration.
pub(super) fn rules(rulesets: &Rulesets, pins: &PinDir) -> Vec<Check> {
    let guarded = guarded(pins);
    let addresses = presets();
    let rules = rulesets.rules.iter().map(Match::from_rule);
    let checks: Vec<_> = rules.filter_map(|found| found.check(&addresses, &guarded)).collect();
    if !checks.is_empty() {
        return checks;
    }
    let found = if rulesets.sources.is_empty() {
        "not looked at: neither iptables-save nor nft can be run here".to_owned()
    } else {
        format!("none for a metadata service ({})", rulesets.sources.join(", "))
    };
    vec![Check::ok(NAME, found)]
}

/// All that any provider has.
fn presets() -> BTreeSet<IpAddr> {
    let endpoints = PROVIDERS.iter().chain(EXTRAS).flat_map(Provider::endpoints);
    endpoints.map(|endpoint| endpoint.address).collect()
}

/// What is guarded, or would be by default.
fn guarded(pins: &PinDir) -> BTreeSet<IpAddr> {
    let in_force = Maps::open(pins).ok().and_then(|maps| endpoints::read(&maps).ok());
    let by_default = || {
        let provider = Dmi::read(DMI_DIR.as_ref()).provider();
        provider.endpoints().map(|endpoint| endpoint.address).collect()
    };
    in_force.map_or_else(by_default, |endpoints| endpoints.into_keys().map(plain).collect())
}

/// A rule of iptables, from its chain on.
fn parse(words: &[String]) -> Match {
    let mut found = Match::default();
    let mut is_negated = false;
    let mut left = words.iter().skip(1);
    while let Some(option) = left.next() {
        if option == "!" {
            is_negated = true;
            continue;
        }
        let mut value = || left.next().cloned().unwrap_or_default();
        match &**option {
            "-d" if !is_negated => found.destination = network(&value()),
            "-s" => found.has_negated_source = is_negated,
            "-i" if !is_negated => found.interface = value(),
            "--dport" if !is_negated => found.port = value(),
            "-j" => found.target = value(),
            "--to-destination" | "--to-ports" | "--on-port" => found.to = format!(":{}", value()),
            _ => {}
        }
        is_negated = false;
    }
    found
}

/// An address and how many bits of it count.
fn network(text: &str) -> Option<(IpAddr, u8)> {
    let (address, bits) = text.split_once('/').unwrap_or((text, ""));
    let address: IpAddr = address.parse().ok()?;
    let all = if address.is_ipv4() { 32 } else { 128 };
    Some((address, bits.parse().unwrap_or(all)))
}

impl Match {
    fn from_rule(rule: &ListedRule) -> Self {
        let mut found = match &rule.body {
            Body::Iptables(words) => parse(words),
            Body::Nft(expressions) => {
                let mut found = Self::default();
                for expression in expressions {
                    found.take_in(expression);
                }
                found
            }
        };
        found.table.clone_from(&rule.table);
        found.chain.clone_from(&rule.chain);
        found.text.clone_from(&rule.text);
        found.remove.clone_from(&rule.remove);
        found
    }

    /// Takes in what one expression of a rule of nftables says.
    fn take_in(&mut self, expression: &Value) {
        if let Some(matched) = expression.get("match") {
            let word = |pointer| matched.pointer(pointer).and_then(Value::as_str);
            let Some(right) = matched.get("right") else { return };
            let is_negated = word("/op") == Some("!=");
            match word("/left/payload/field") {
                Some("daddr") if !is_negated => self.destination = nft_network(right),
                Some("saddr") => self.has_negated_source = is_negated,
                Some("dport") if !is_negated => self.port = right.to_string(),
                _ => {}
            }
            if word("/left/meta/key") == Some("iifname") {
                right.as_str().unwrap_or_default().clone_into(&mut self.interface);
            }
        }
        for verdict in ["drop", "reject", "accept", "return", "dnat", "redirect", "tproxy"] {
            if let Some(statement) = expression.get(verdict) {
                self.target = verdict.to_uppercase();
                self.to = format!(":{}", statement["port"]);
            }
        }
    }

    fn target(&self) -> Target {
        match &*self.target {
            "DROP" | "REJECT" => Target::Denied,
            "DNAT" | "REDIRECT" | "TPROXY" => Target::Elsewhere,
            "ACCEPT" | "RETURN" => Target::LetThrough,
            _ => Target::Other,
        }
    }

    /// The first of these addresses that it is about, one that is guarded before all others. A rule about everything is
    /// about none.
    fn address(&self, addresses: &BTreeSet<IpAddr>, guarded: &BTreeSet<IpAddr>) -> Option<IpAddr> {
        let (network, bits) = self.destination.filter(|&(_, bits)| bits >= 8)?;
        guarded.iter().chain(addresses).copied().find(|&address| contains(network, bits, address))
    }

    /// Whose it looks like, and what it is called.
    fn origin(&self, address: IpAddr) -> (&'static str, &'static str) {
        let leads_to = |ports: &[&str]| ports.iter().any(|port| self.to.ends_with(port));
        match self.target() {
            Target::Denied if self.has_negated_source && self.chain == "FORWARD" && self.port == "80" => {
                ("aks", "AKS' IMDS restriction: drops what is forwarded to TCP port 80")
            }
            Target::Denied if self.interface == "eni+" => (
                "eks",
                "eksctl's disablePodIMDS, or AWS' advice for EKS: drops what pods of the VPC CNI send",
            ),
            Target::Denied if self.chain == "DOCKER-USER" || self.interface.starts_with("docker") => {
                ("docker", "AWS' advice for ECS: drops what containers of Docker send")
            }
            Target::Elsewhere if address == IpAddr::from([169, 254, 170, 2]) => {
                ("ecs", "the ECS agent's: leads to its own endpoint for task credentials")
            }
            Target::Elsewhere if leads_to(&KUBE2IAM_PORTS) => {
                ("kube2iam", "kube2iam's or kiam's: leads pods to it")
            }
            Target::Elsewhere if leads_to(&GKE_PORTS) => {
                ("gke", "GKE's Workload Identity: leads pods to its metadata server")
            }
            Target::Denied => ("other", "drops"),
            Target::Elsewhere => ("other", "leads elsewhere"),
            Target::LetThrough => ("other", "lets through"),
            Target::Other => ("other", "judges"),
        }
    }

    /// What is to be said of it, where it is about one of these addresses, of which some are guarded.
    fn check(self, addresses: &BTreeSet<IpAddr>, guarded: &BTreeSet<IpAddr>) -> Option<Check> {
        let address = self.address(addresses, guarded)?;
        let (origin, what) = self.origin(address);
        let target = self.target();
        let is_guarded = guarded.contains(&address);
        let conflicts = target == Target::Elsewhere && is_guarded;
        let remove = &self.remove;
        let remedy = match target {
            _ if !is_guarded => {
                format!(
                    "imds-agent does not guard {address}, and leaves it to this rule; to remove it: {remove}"
                )
            }
            Target::Denied if origin == "aks" => format!(
                "no conflict: imds-agent denies all of that and more. Once `verify` holds it can go, by `az aks update \
                 --disable-imds-restriction` and a node image upgrade, as the kubelet brings it back; until then: {remove}"
            ),
            Target::Denied => {
                format!(
                    "no conflict: imds-agent denies all of that and more. Once `verify` holds it can go: {remove}"
                )
            }
            Target::Elsewhere => format!(
                "conflict: imds-agent denies what pods send before this rule sees it, so that what it leads to hears no pod. \
                 Do without that, then: {remove}; or do not guard {address}, or exempt the pods that need it"
            ),
            Target::LetThrough | Target::Other => format!(
                "no conflict: imds-agent denies what pods send whatever this rule says; to remove it: {remove}"
            ),
        };
        let rule = Rule {
            table: self.table,
            chain: self.chain,
            text: self.text,
            origin,
            address,
            conflicts,
            remove: self.remove,
        };
        let found = format!("{}: {what}", rule.text);
        Some(Check { rule: Some(rule), ..Check::degraded(NAME, found, remedy) })
    }
}

/// Of an address, a prefix, or the first of a set of them.
fn nft_network(right: &Value) -> Option<(IpAddr, u8)> {
    if let Some(prefix) = right.get("prefix") {
        let bits = u8::try_from(prefix["len"].as_u64()?).ok()?;
        return Some((prefix["addr"].as_str()?.parse().ok()?, bits));
    }
    match right.get("set") {
        Some(set) => nft_network(set.get(0)?),
        None => network(right.as_str()?),
    }
}

fn contains(network: IpAddr, bits: u8, address: IpAddr) -> bool {
    let bits_of = |address: IpAddr| match address {
        IpAddr::V4(address) => (u128::from(address.to_bits()) << 96, 32),
        IpAddr::V6(address) => (address.to_bits(), 128),
    };
    let ((network, width), (address, other)) = (bits_of(network), bits_of(address));
    let host_bits = 128 - u32::from(bits.min(width));
    width == other && (host_bits == 128 || network >> host_bits == address >> host_bits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::rulesets::of_iptables;

    const IMDS: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(169, 254, 169, 254));

    /// Whose rule it is, and whether it conflicts; `None` for one that is about something else.
    fn judged(rule: &str) -> Option<(&'static str, bool)> {
        let text = format!(
            "# Generated by iptables-save v1.8.9\n*mangle\n:FORWARD ACCEPT [0:0]\n-A {rule}\nCOMMIT\n"
        );
        let [found] = &of_iptables(&text, "iptables")[..] else { panic!("{rule}") };
        let check = Match::from_rule(found).check(&presets(), &BTreeSet::from([IMDS]))?;
        let rule_of = check.rule.unwrap();
        assert_eq!(rule_of.remove, format!("iptables -t mangle -D {rule}"));
        assert!(check.remedy.unwrap().contains(&rule_of.remove));
        Some((rule_of.origin, rule_of.conflicts))
    }

    #[test]
    fn rules_of_others_are_known() {
        for (rule, expected) in [
            (
                "FORWARD ! -s 10.224.0.4/32 -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -j DROP",
                ("aks", false),
            ),
            ("FORWARD -d 169.254.169.254/32 -i eni+ -j DROP", ("eks", false)),
            ("DOCKER-USER -d 169.254.169.254/32 -i docker+ -j DROP", ("docker", false)),
            (
                "PREROUTING -d 169.254.169.254/32 -i cali+ -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.0.0.4:8181",
                ("kube2iam", true),
            ),
            (
                "PREROUTING -d 169.254.170.2/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination 127.0.0.1:51679",
                ("ecs", false),
            ),
            (
                "PREROUTING -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -m comment --comment \"metadata \\\"it\\\" -j\" \
                 -j DNAT --to-destination 169.254.169.252:988",
                ("gke", true),
            ),
            ("FORWARD -d 169.254.0.0/16 -j REJECT --reject-with icmp-port-unreachable", ("other", false)),
            ("OUTPUT -d 169.254.169.254/32 -j ACCEPT", ("other", false)),
        ] {
            assert_eq!(judged(rule), Some(expected), "{rule}");
        }
        for rule in [
            "FORWARD -j ACCEPT",
            "FORWARD -d 10.0.0.0/8 -j DROP",
            "FORWARD ! -d 169.254.169.254/32 -j ACCEPT",
            "FORWARD -d 0.0.0.0/0 -j DROP",
        ] {
            assert_eq!(judged(rule), None, "{rule}");
        }
    }

    #[test]
    fn networks_contain_their_addresses() {
        let parse = |text: &str| text.parse::<IpAddr>().unwrap();
        assert!(contains(parse("169.254.0.0"), 16, IMDS) && contains(IMDS, 32, IMDS));
        assert!(!contains(parse("169.253.0.0"), 16, IMDS) && !contains(parse("fd00::"), 8, IMDS));
        assert!(contains(parse("fd00:ec2::"), 32, parse("fd00:ec2::254")));
    }
}
