//! The traffic that a firewall rule matches, and the action of the rule.

use std::net::IpAddr;

use super::{address_range::AddressRange, number_set::NumberSet};

/// Traffic that a rule matches. Conditions that can't be read are left out, so that this is at least the traffic of the
/// rule.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Traffic {
    /// Destination addresses; `None` for all.
    pub(crate) destinations: Option<Vec<AddressRange>>,
    pub(crate) protocols: NumberSet,
    pub(crate) ports: NumberSet,
    /// Users and groups of the sending process, such as `uid 1000`.
    pub(crate) owners: Vec<String>,
    pub(crate) uids: NumberSet,
    /// Input interface; empty for all.
    pub(crate) interface: String,
    pub(crate) has_negated_source: bool,
}

/// One verdict of a rule. A rule has several if a verdict map decides.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Branch {
    pub(crate) traffic: Traffic,
    pub(crate) action: Action,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Action {
    Deny,
    /// Changes the destination. Contains `:PORT` if the rule names a port.
    Redirect(String),
    Accept,
    /// Continues in another chain of the table.
    Jump(String),
    Other,
}

impl Default for Traffic {
    fn default() -> Self {
        Self {
            destinations: None,
            protocols: NumberSet::all(),
            ports: NumberSet::all(),
            owners: Vec::new(),
            uids: NumberSet::all(),
            interface: String::new(),
            has_negated_source: false,
        }
    }
}

impl Traffic {
    pub(crate) fn limit_destinations(&mut self, ranges: Vec<AddressRange>) {
        self.destinations = Some(match self.destinations.take() {
            None => ranges,
            Some(before) => {
                let pairs =
                    before.iter().flat_map(|&one| ranges.iter().map(move |&other| one.intersection(other)));
                pairs.flatten().collect()
            }
        });
    }

    /// Adds a condition on users or groups to the description of the owners.
    pub(crate) fn limit_owners(&mut self, kind: &str, owners: &str, is_negated: bool) {
        let not = if is_negated { "not " } else { "" };
        self.owners.push(format!("{kind} {not}{owners}"));
    }

    /// Formats the owners in parentheses after `before`; empty for traffic of all processes.
    pub(crate) fn owners_after(&self, before: &str) -> String {
        if self.owners.is_empty() {
            return String::new();
        }
        format!("{before} ({})", self.owners.join(", "))
    }

    pub(crate) fn reaches(&self, address: IpAddr) -> bool {
        self.destinations.as_ref().is_none_or(|ranges| ranges.iter().any(|range| range.contains(address)))
    }

    /// Describes protocols and ports, such as `tcp/80`; empty if they are not limited.
    pub(crate) fn services(&self) -> String {
        let protocol = match self.protocols.single() {
            Some(6) => "tcp".to_owned(),
            Some(17) => "udp".to_owned(),
            _ if self.protocols.is_all() => String::new(),
            _ => format!("protocol {}", self.protocols),
        };
        match (protocol.is_empty(), self.ports.is_all()) {
            (_, true) => protocol,
            (true, false) => format!("port {}", self.ports),
            (false, false) => format!("{protocol}/{}", self.ports),
        }
    }
}

/// Returns the number of a protocol by its name, as `iptables-save` and `nft` print it.
pub(crate) fn protocol(name: &str) -> Option<u32> {
    Some(match name {
        "icmp" => 1,
        "tcp" => 6,
        "udp" => 17,
        "dccp" => 33,
        "gre" => 47,
        "esp" => 50,
        "ah" => 51,
        "icmpv6" | "ipv6-icmp" => 58,
        "sctp" => 132,
        "udplite" => 136,
        number => number.parse::<u8>().ok()?.into(),
    })
}
