//! Differences between the loaded configuration and the node: interfaces and cgroups without their programs, excluded
//! interfaces, and protected addresses of the node itself.

use std::{collections::BTreeSet, net::IpAddr};

use imds_ebpf_common::Role;

use super::{chains::BaseHook, traffic::Traffic};
use crate::{
    datapath::pin::dir::PinDir,
    node::{netlink::Netlink, netns},
    telemetry::status,
};

/// Maximum number of gaps that an opening names.
const NAMED: usize = 3;

#[derive(Clone, Debug, Default)]
pub(crate) struct ObservedGaps {
    /// Reasons for which requests of pods may pass, one line each.
    pub(crate) reasons: Vec<String>,
    /// Names of the interfaces that the configuration excludes.
    pub(crate) excluded: BTreeSet<String>,
    /// Addresses of the node. A metadata service of the node itself has one of them.
    pub(crate) node_addresses: BTreeSet<IpAddr>,
}

impl ObservedGaps {
    pub(crate) async fn read(pins: &PinDir, netlink: &Netlink) -> Self {
        let mut gaps = Self::default();
        match netns::addresses() {
            Ok(addresses) => gaps.node_addresses = addresses,
            Err(error) => gaps.reasons.push(format!("failed to list the addresses of the node: {error}")),
        }
        match status::gather_enforcement(pins, netlink).await {
            Ok(report) => {
                gaps.reasons.extend(report.gaps());
                let excluded = report.interfaces.into_iter();
                let excluded = excluded.filter(|interface| interface.role == Role::Excluded.name());
                gaps.excluded = excluded.map(|interface| interface.name).collect();
            }
            Err(error) => gaps.reasons.push(format!("failed to read the status: {error}")),
        }
        gaps
    }

    /// Describes the traffic of a rule that passes because of the gaps. `hooks` are those from which packets reach the rule.
    pub(crate) fn openings(
        &self,
        traffic: &Traffic,
        hooks: &BTreeSet<BaseHook>,
        protected: impl IntoIterator<Item = IpAddr>,
    ) -> Vec<String> {
        let mut openings = Vec::new();
        if hooks.iter().any(|hook| hook.sees_pods()) {
            if !self.reasons.is_empty() {
                openings.push(format!("requests of pods: {}", listed(&self.reasons)));
            }
            if !self.excluded.is_empty() {
                let excluded: Vec<_> = self.excluded.iter().cloned().collect();
                let excluded = listed(&excluded);
                openings.push(format!(
                    "requests of pods through excluded interfaces: {excluded} (interfaces.exclude)"
                ));
            }
        }
        // The node's packets to its own addresses pass `prerouting`, and `ingress` of the loopback interface.
        let is_looped = hooks.contains(&BaseHook::Prerouting) || hooks.contains(&BaseHook::Ingress);
        let is_local = |address: &IpAddr| self.node_addresses.contains(address) && traffic.reaches(*address);
        if is_looped && let Some(address) = protected.into_iter().find(is_local) {
            openings.push(format!(
                "requests to the service on the node itself at {address}, from its own processes and from other machines"
            ));
        }
        openings
    }
}

/// Joins the first lines, and counts the others.
fn listed(lines: &[String]) -> String {
    let (named, others) = lines.split_at(lines.len().min(NAMED));
    let more = if others.is_empty() { String::new() } else { format!(", and {} more", others.len()) };
    format!("{}{more}", named.join(", "))
}
