//! Adds the exempt senders to the status report, with the names of rules, interfaces, pods and endpoints.

use std::collections::BTreeMap;

use imds_ebpf_common::{
    Address, ExemptionKey, ExemptionRecord, Subject, SubjectKind, Verdict, names::MAP_EXEMPT,
};
use toml::Value;

use super::{ExemptSender, StatusReport, effective_table, unreadable};
use crate::{
    datapath::{DatapathError, maps::exemption_maps, object::Maps},
    encode::ip_address,
    kube::pod_ref::PodRef,
};

impl StatusReport {
    /// Adds the exempt senders. Needs the report's endpoints and interfaces for their names.
    pub(crate) fn add_exemptions(
        &mut self,
        maps: &Maps,
        names: &BTreeMap<Subject, PodRef>,
    ) -> Result<(), DatapathError> {
        let exemptions = exemption_maps::read(maps).map_err(unreadable(MAP_EXEMPT))?;
        // A bridge entry covers exempt pods behind it, which have entries of their own.
        let is_of_pod = |record: &ExemptionRecord| record.flags != ExemptionRecord::BRIDGE;
        let entries: Vec<_> =
            exemptions.entries.into_iter().filter(|(_, record)| is_of_pod(record)).collect();
        let rules = if entries.is_empty() { Vec::new() } else { exemption_rules(maps)? };
        let sender = |(exemption, record)| self.sender(exemption, record, &rules, names);
        let mut senders: Vec<_> = entries.into_iter().map(sender).collect();
        let key = |sender: &ExemptSender| {
            let ExemptSender { rule, interface, netns_cookie, cgroup, endpoint, .. } = sender.clone();
            (rule, interface.is_none(), interface, netns_cookie, cgroup, endpoint)
        };
        senders.sort_by_key(key);
        self.exemptions = senders;
        Ok(())
    }

    fn sender(
        &self,
        exemption: ExemptionKey,
        record: ExemptionRecord,
        rules: &[String],
        names: &BTreeMap<Subject, PodRef>,
    ) -> ExemptSender {
        let ExemptionKey { address, subject } = exemption;
        let is_audited = record.verdict == Verdict::Audited as u32;
        let verdict = if is_audited { Verdict::Audited } else { Verdict::Exempt };
        let mut sender = ExemptSender {
            rule: rule_name(record.rule, rules),
            interface: None,
            netns_cookie: None,
            cgroup: None,
            pod: names.get(&subject).cloned(),
            endpoint: (address != Address::ANY).then(|| self.endpoint_name(address)),
            verdict: verdict.name(),
        };
        match SubjectKind::from_u64(subject.kind) {
            Some(SubjectKind::Interface) => {
                let mut interfaces = self.interfaces.iter();
                let known = interfaces.find(|interface| u64::from(interface.ifindex) == subject.id);
                let name = known.map_or_else(|| subject.id.to_string(), |interface| interface.name.clone());
                sender.interface = Some(name);
            }
            Some(SubjectKind::Netns) => sender.netns_cookie = Some(subject.id),
            Some(SubjectKind::Cgroup) => sender.cgroup = Some(subject.id),
            None => {}
        }
        sender
    }

    fn endpoint_name(&self, address: Address) -> String {
        let address = ip_address(address);
        let mut endpoints = self.endpoints.iter();
        let known = endpoints.find(|endpoint| endpoint.address == address);
        known.map_or_else(|| address.to_string(), |endpoint| endpoint.name.clone())
    }

    pub(crate) fn senders_by_rule(&self) -> BTreeMap<&str, usize> {
        let mut senders = BTreeMap::new();
        for sender in &self.exemptions {
            *senders.entry(sender.rule.as_str()).or_default() += 1;
        }
        senders
    }
}

/// Returns the name of the rule with this number, counted from 1, or the number if `rules` does not contain it.
pub(crate) fn rule_name(number: u32, rules: &[String]) -> String {
    let name = (number as usize).checked_sub(1).and_then(|index| rules.get(index));
    name.cloned().unwrap_or_else(|| number.to_string())
}

/// Returns the names of the exemptions of the effective configuration, in their order.
pub(crate) fn exemption_rules(maps: &Maps) -> Result<Vec<String>, DatapathError> {
    let table = effective_table(maps)?;
    let rules = table.get("exempt").and_then(Value::as_array);
    let name = |rule: &Value| rule.get("name").and_then(Value::as_str).unwrap_or_default().to_owned();
    Ok(rules.into_iter().flatten().map(name).collect())
}
