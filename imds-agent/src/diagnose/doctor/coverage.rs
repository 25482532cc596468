//! Compares the denials of the loaded configuration with those of a firewall rule. The difference opens if the rule is
//! removed.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use imds_ebpf_common::{Address, ExemptionRecord, Hook, Mode, SubjectKind};

use super::{
    chains::BaseHook, node_allow_coverage::AllowList, observed_gaps::ObservedGaps, traffic::Traffic,
};
use crate::{
    config::{
        Hooks,
        endpoint_set::AllowedPort,
        provider::{DMI_DIR, Dmi, Provider},
    },
    datapath::{
        maps::{endpoint_maps, exemption_maps},
        object::Maps,
        pin::dir::PinDir,
    },
    encode::ip_address,
    telemetry::status::{exemption_rules, rule_name},
};

#[derive(Clone, Debug, Default)]
pub(crate) struct Enforcement {
    pub(crate) mode: Option<Mode>,
    pub(crate) hooks: Hooks,
    /// Protected addresses with their allowed ports. If nothing is loaded, those that a default configuration protects.
    pub(crate) endpoints: BTreeMap<IpAddr, Vec<AllowedPort>>,
    /// Names of the exemptions that have found a pod, by protected address.
    pub(crate) exemptions: BTreeMap<IpAddr, BTreeSet<String>>,
    /// Subset of `exemptions` that identifies pods by cgroup, which also applies to pods with hostNetwork.
    pub(crate) cgroup_exemptions: BTreeMap<IpAddr, BTreeSet<String>>,
    /// Processes of the node that are not denied; `None` if none is.
    pub(crate) node_allow: Option<AllowList>,
    /// Program of the allow list that is not attached, so that no process of the node is denied.
    pub(crate) missing_node_program: Option<&'static str>,
    /// Differences between this configuration and the node.
    pub(crate) gaps: ObservedGaps,
}

impl Enforcement {
    pub(crate) fn read(pins: &PinDir) -> Self {
        Maps::open(pins)
            .ok()
            .and_then(|maps| Self::from_maps(pins, &maps))
            .unwrap_or_else(|| Self::from_provider(Dmi::read(DMI_DIR.as_ref()).provider(), None))
    }

    /// Returns the denials of a configuration that sets only the provider and the mode.
    pub(crate) fn from_provider(provider: &Provider, mode: Option<Mode>) -> Self {
        let endpoints = provider.endpoints().map(|endpoint| (endpoint.address, endpoint.allow_ports));
        Self { mode, endpoints: endpoints.collect(), ..Self::default() }
    }

    /// Reads the pinned maps. Returns `None` if one can't be read.
    fn from_maps(pins: &PinDir, maps: &Maps) -> Option<Self> {
        let policy = maps.policy.get(&0, 0).ok()?;
        let endpoints = endpoint_maps::read(maps).ok()?.into_iter();
        let endpoints: BTreeMap<_, _> =
            endpoints.map(|endpoint| (endpoint.address, endpoint.allow_ports)).collect();
        let names = exemption_rules(maps).ok()?;
        let mut exemptions: BTreeMap<IpAddr, BTreeSet<String>> = BTreeMap::new();
        let mut cgroup_exemptions = exemptions.clone();
        for (exemption, record) in exemption_maps::read(maps).ok()?.entries {
            // A bridge stands for the pods behind it, which have entries of their own.
            if record.flags == ExemptionRecord::BRIDGE {
                continue;
            }
            let name = rule_name(record.rule, &names);
            let covers = |address: &&IpAddr| {
                exemption.address == Address::ANY || ip_address(exemption.address) == **address
            };
            for address in endpoints.keys().filter(covers) {
                exemptions.entry(*address).or_default().insert(name.clone());
                if exemption.subject.kind == SubjectKind::Cgroup as u64 {
                    cgroup_exemptions.entry(*address).or_default().insert(name.clone());
                }
            }
        }
        let (mode, hooks) = (Some(Mode::from_u32(policy.mode)), Hooks::from_bits(policy.hooks));
        let enforcement = Self { mode, hooks, endpoints, exemptions, cgroup_exemptions, ..Self::default() };
        if !hooks.contains(Hook::NodeAllow) {
            return Some(enforcement);
        }
        Some(match AllowList::read(pins, maps)? {
            Ok(list) => Self { node_allow: Some(list), ..enforcement },
            Err(program) => Self { missing_node_program: Some(program), ..enforcement },
        })
    }

    pub(crate) fn denies(&self) -> bool {
        self.mode == Some(Mode::Enforce)
    }

    /// Describes the state in which nothing is denied; `None` in enforce mode.
    pub(crate) fn not_enforcing_reason(&self) -> Option<String> {
        match self.mode {
            Some(Mode::Enforce) => None,
            Some(mode) => Some(format!("imds-agent denies nothing in the mode {}", mode.name())),
            None => Some("imds-agent is not loaded and denies nothing".to_owned()),
        }
    }

    /// Reports whether pods are denied all of this traffic to the address.
    pub(crate) fn denies_all_to(&self, address: IpAddr, traffic: &Traffic) -> bool {
        self.denies()
            && self.endpoints.contains_key(&address)
            && self.allowed(address, traffic).next().is_none()
    }

    /// Describes the traffic that the rule denies and the loaded configuration does not. `hooks` are those from which
    /// packets reach the rule.
    pub(crate) fn openings(&self, traffic: &Traffic, hooks: &BTreeSet<BaseHook>, chain: &str) -> Vec<String> {
        if let Some(reason) = self.not_enforcing_reason() {
            return vec![format!("everything that the rule denies: {reason}")];
        }
        let mut openings = self.openings_of_senders(traffic, hooks, chain);
        openings.extend(self.gaps.openings(traffic, hooks, self.endpoints.keys().copied()));
        openings.extend(self.other_addresses(traffic));
        if hooks.iter().any(|hook| hook.sees_pods()) {
            openings.extend(self.openings_of(traffic, "every pod", "the pods", &self.exemptions));
        }
        if self.node_allow.is_some() && hooks.iter().any(|hook| hook.sees_node()) {
            let exempt = &self.cgroup_exemptions;
            openings.extend(self.openings_of(
                traffic,
                "every process of the node",
                "the pods with hostNetwork",
                exempt,
            ));
        }
        openings
    }

    /// Describes the node's own processes that a rule matches, if the programs deny some of them because of an allow list.
    pub(crate) fn restriction_of_node(
        &self,
        address: IpAddr,
        traffic: &Traffic,
        hooks: &BTreeSet<BaseHook>,
    ) -> Option<String> {
        let list = self.node_allow.as_ref()?;
        let is_restricted = self.denies_all_to(address, traffic) && !list.contains_all(&traffic.uids);
        if !is_restricted || !hooks.iter().any(|hook| hook.sees_node()) {
            return None;
        }
        let owners = traffic.owners_after("");
        let place = list.cgroup.as_ref().map(|path| format!(" in the cgroup {path}")).unwrap_or_default();
        let entries = list.entries_of(&traffic.uids);
        let except = if entries.is_empty() {
            "node.allow contains none of them".to_owned()
        } else {
            format!("except those in node.allow: {}", entries.join(" and "))
        };
        Some(format!("the node's processes{place}{owners} that the rule matches ({except})"))
    }

    /// Compares the senders: `imds-agent` denies pods, and lets the node's own processes pass, or those in the allow list.
    fn openings_of_senders(&self, traffic: &Traffic, hooks: &BTreeSet<BaseHook>, chain: &str) -> Vec<String> {
        let mut openings = Vec::new();
        if hooks.is_empty() {
            openings
                .push(format!("unknown traffic: no base chain in the listing leads to the chain {chain}"));
        }
        if hooks.iter().any(|hook| hook.sees_node()) {
            if let Some(list) = &self.node_allow {
                openings.extend(list.openings(traffic));
            } else {
                let pods =
                    if self.hooks.contains(Hook::HostNetwork) { "" } else { " and pods with hostNetwork" };
                let owners = traffic.owners_after("");
                let reason = self
                    .missing_node_program
                    .map(|program| format!(": {program} of node_allow is not attached"));
                openings.push(format!(
                    "requests of the node's own processes{owners}{pods}, which imds-agent lets pass{}",
                    reason.unwrap_or_default()
                ));
            }
        }
        if hooks.contains(&BaseHook::Input) {
            openings.push(
                "requests to a service on the node itself, from its own processes and from other machines"
                    .to_owned(),
            );
        }
        let arrives = hooks.contains(&BaseHook::Prerouting) || hooks.contains(&BaseHook::Ingress);
        if arrives && !self.hooks.contains(Hook::FromPod) {
            openings
                .push("requests of pods to a service on the node itself: hooks.from_pod is off".to_owned());
        }
        let is_forwarded = hooks.iter().any(|hook| hook.sees_pods());
        if is_forwarded && !self.hooks.contains(Hook::NodeEgress) {
            let senders =
                if self.hooks.contains(Hook::FromPod) { "other machines" } else { "pods and other machines" };
            openings.push(format!("requests that the node forwards for {senders}: hooks.node_egress is off"));
        }
        openings
    }

    fn other_addresses(&self, traffic: &Traffic) -> Option<String> {
        let protected: BTreeSet<_> = self.endpoints.keys().copied().collect();
        let Some(ranges) = &traffic.destinations else {
            return Some("all addresses except the protected ones".to_owned());
        };
        let open = ranges.iter().filter(|range| !range.is_within(&protected)).map(|range| {
            let except: Vec<_> = protected
                .iter()
                .filter(|&&address| range.contains(address))
                .map(ToString::to_string)
                .collect();
            if except.is_empty() {
                range.to_string()
            } else {
                format!("{range} except {}", except.join(" and "))
            }
        });
        let open: Vec<_> = open.collect();
        let services = traffic.services();
        let services = if services.is_empty() { services } else { format!("{services} of ") };
        (!open.is_empty()).then(|| format!("{services}{}, not protected by imds-agent", open.join(", ")))
    }

    /// Compares the ports and the exempt pods. `everyone` names the senders that can use allowed
    /// ports, and `pods` those of `exemptions`.
    fn openings_of(
        &self,
        traffic: &Traffic,
        everyone: &str,
        pods: &str,
        exemptions: &BTreeMap<IpAddr, BTreeSet<String>>,
    ) -> Vec<String> {
        let mut openings = Vec::new();
        for &address in self.endpoints.keys().filter(|&&address| traffic.reaches(address)) {
            let allowed: Vec<_> = self.allowed(address, traffic).map(ToString::to_string).collect();
            if !allowed.is_empty() {
                let allowed = allowed.join(" and ");
                openings.push(format!("{allowed} of {address} for {everyone} (allowed ports)"));
            }
            for name in exemptions.get(&address).into_iter().flatten() {
                openings.push(format!("{address} for {pods} of the exemption {name:?}"));
            }
        }
        openings
    }

    /// Returns the allowed ports of the address that the traffic includes.
    fn allowed(&self, address: IpAddr, traffic: &Traffic) -> impl Iterator<Item = &AllowedPort> {
        let allowed = self.endpoints.get(&address).into_iter().flatten();
        allowed.filter(|AllowedPort(service)| {
            traffic.protocols.contains(service.protocol.into()) && traffic.ports.contains(service.port.into())
        })
    }
}
