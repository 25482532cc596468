//! Adds the exempt senders to the status report, with the names of rules, interfaces, pods and endpoints.

use std::collections::BTreeMap;

use imds_ebpf_common::{
    Address, ExemptionKey, ExemptionRecord, RedirectRecord, Subject, SubjectKind, Verdict,
    names::{MAP_EXEMPT, MAP_REDIRECT},
};
use toml::Value;

use super::{ExemptSender, StatusReport, effective_table, unreadable};
use crate::{
    datapath::{
        DatapathError,
        maps::{exemption_maps, redirect_maps},
        object::Maps,
    },
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
        let redirects = redirect_maps::read(maps).map_err(unreadable(MAP_REDIRECT))?;
        self.add_explained(&redirects);
        let redirects: Vec<_> =
            redirects.into_iter().filter(|(_, record)| record.rule != RedirectRecord::EXPLAINS).collect();
        let is_empty = entries.is_empty() && redirects.is_empty();
        let tables = if is_empty { Vec::new() } else { rule_tables(maps)? };
        let rules: Vec<_> = tables.iter().map(rule_name_of).collect();
        let sender = |(exemption, record)| self.sender(exemption, record, &rules, names);
        let mut senders: Vec<_> = entries.into_iter().map(sender).collect();
        senders.extend(redirects.into_iter().map(|(key, record)| {
            let of_rule = (record.rule as usize).checked_sub(1).and_then(|index| tables.get(index));
            ExemptSender {
                verdict: Verdict::Redirected.name(),
                allow: Some(of_rule.map(allowed_requests).unwrap_or_default()),
                other_rules: record.rules.saturating_sub(1),
                ..self.sender(key, ExemptionRecord::new(Verdict::Exempt, record.rule), &rules, names)
            }
        }));
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
            allow: None,
            other_rules: 0,
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

/// Returns the name of the rule with this number, counted from 1, or the number if `rules` does not contain it. 0 stands for the
/// broker, which no rule exempts.
pub(crate) fn rule_name(number: u32, rules: &[String]) -> String {
    if number == 0 {
        return "imds-broker".to_owned();
    }
    let name = (number as usize).checked_sub(1).and_then(|index| rules.get(index));
    name.cloned().unwrap_or_else(|| number.to_string())
}

/// Returns the names of the exemptions of the effective configuration, in their order.
pub(crate) fn exemption_rules(maps: &Maps) -> Result<Vec<String>, DatapathError> {
    Ok(rule_tables(maps)?.iter().map(rule_name_of).collect())
}

/// Returns the tables of the exemptions of the effective configuration, in their order.
fn rule_tables(maps: &Maps) -> Result<Vec<Value>, DatapathError> {
    let rules = effective_table(maps)?.remove("exempt");
    Ok(rules.and_then(|rules| rules.try_into().ok()).unwrap_or_default())
}

fn rule_name_of(rule: &Value) -> String {
    rule.get("name").and_then(Value::as_str).unwrap_or_default().to_owned()
}

/// Returns the list `allow` of a rule; empty without one.
fn allowed_requests(rule: &Value) -> Vec<String> {
    let list = rule.get("allow").and_then(Value::as_array).into_iter().flatten();
    list.filter_map(Value::as_str).map(str::to_owned).collect()
}
