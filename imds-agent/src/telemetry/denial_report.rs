//! Report of denied senders, of senders that audit mode would deny, and of HTTP requests, with the rules that would exempt them.
//! docs/json.md describes the fields of the JSON form.

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::PathBuf,
};

use comfy_table::{Table, presets::NOTHING};
use imds_ebpf_common::{
    Verdict,
    event_log::{DenialKey, DenialRecord},
};
use jiff::Timestamp;
use serde::Serialize;

use super::{
    proposed_rules::rules,
    request_report::{self, ReportedRequest},
};
use crate::{
    config::endpoint_set::Endpoint,
    encode::{field_text, hook_name, ip_address, nonempty_text, raw_field_text, timestamp},
    kube::pod_ref::PodRef,
    node::{kubepods, netns},
};

/// Schema version of the JSON output. Removed and changed fields increase it.
const SCHEMA: u32 = 1;
/// Maximum length of a rule's name in characters.
const MAX_NAME: usize = 63;

/// Report that `imds-agent report` prints.
#[derive(Clone, Debug, Serialize)]
pub struct DenialReport {
    pub(crate) schema: u32,
    pub(crate) pin_dir: PathBuf,
    pub(crate) denials: Vec<Denial>,
    pub(crate) requests: Vec<ReportedRequest>,
    /// Rules that would exempt all these senders, in the syntax of the configuration file.
    pub rules: String,
}

/// Denials of one sender at one endpoint.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Denial {
    #[serde(flatten)]
    pub(crate) sender: DenialSubject,
    pub(crate) pod: Option<String>,
    pub(crate) endpoint: Option<String>,
    pub(crate) address: IpAddr,
    pub(crate) verdict: &'static str,
    pub(crate) counts: BTreeMap<&'static str, u64>,
    pub(crate) bytes: u64,
    pub(crate) first: Timestamp,
    pub(crate) last: Timestamp,
}

/// Pods with the same namespace, service account and label, or a sender without a known pod.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub(crate) struct DenialSubject {
    pub(crate) namespace: Option<String>,
    pub(crate) service_account: Option<String>,
    pub(crate) label: Option<String>,
    pub(crate) interface: Option<String>,
    pub(crate) comm: Option<String>,
    pub(crate) cgroup: Option<String>,
    /// True if a name is escaped, so that no rule can match it.
    #[serde(skip)]
    pub(crate) is_escaped: bool,
}

impl DenialReport {
    /// Builds the report from the records in `pin_dir`. `protected` are the protected endpoints, `pods` the names of pod
    /// interfaces that a rule can name.
    pub fn new(
        pin_dir: PathBuf,
        records: &[(DenialKey, DenialRecord)],
        protected: &[Endpoint],
        pods: &BTreeSet<String>,
    ) -> Self {
        let mut merged: BTreeMap<(DenialSubject, IpAddr, u32), Denial> = BTreeMap::new();
        for (key, record) in records {
            let (sender, address) = (DenialSubject::from_record(record), ip_address(key.address));
            let (first, last) = (timestamp(record.first), timestamp(record.last));
            let named = protected.iter().find(|endpoint| endpoint.address == address);
            let verdict =
                if key.verdict == Verdict::Audited as u32 { Verdict::Audited } else { Verdict::Denied };
            let denial = merged.entry((sender.clone(), address, key.verdict)).or_insert_with(|| Denial {
                sender,
                pod: None,
                endpoint: named.map(|endpoint| endpoint.name.clone()),
                address,
                verdict: verdict.name(),
                counts: BTreeMap::new(),
                bytes: 0,
                first,
                last,
            });
            let count = denial.counts.entry(hook_name(key.hook)).or_default();
            *count = count.saturating_add(record.count);
            denial.bytes = denial.bytes.saturating_add(record.bytes);
            denial.first = denial.first.min(first);
            if last >= denial.last {
                denial.last = last;
                denial.pod = nonempty_text(&record.pod);
            }
        }
        let mut denials: Vec<_> = merged.into_values().collect();
        denials.sort_by_key(|denial| std::cmp::Reverse(denial.last));
        let rules = rules(&denials, &[], "", pods);
        Self { schema: SCHEMA, pin_dir, denials, requests: Vec::new(), rules }
    }

    /// Adds requests to endpoints of `provider`. At these endpoints, the rules allow single requests to their senders, unless
    /// `provider` is `None`, for a node that cannot apply such rules.
    #[must_use]
    pub(crate) fn with_requests(
        self,
        requests: Vec<ReportedRequest>,
        provider: Option<&str>,
        pods: &BTreeSet<String>,
    ) -> Self {
        let rules =
            provider.map(|provider| rules(&self.denials, &requests, provider, pods)).unwrap_or(self.rules);
        Self { requests, rules, ..self }
    }

    /// Returns the report as text that ends with a newline.
    pub fn table(&self) -> String {
        let mut parts = vec![self.denial_table(), request_report::table(&self.requests)];
        parts.retain(|part| !part.is_empty());
        if parts.is_empty() {
            return "no denials are recorded\n".to_owned();
        }
        if !self.rules.is_empty() {
            parts.push(format!("rules that would exempt these senders:\n\n{}", self.rules));
        }
        parts.join("\n")
    }

    fn denial_table(&self) -> String {
        if self.denials.is_empty() {
            return String::new();
        }
        let hooks: BTreeSet<_> =
            self.denials.iter().flat_map(|denial| denial.counts.keys().copied()).collect();
        let mut table = Table::new();
        table.load_style(NOTHING);
        let titles = hooks.iter().map(|hook| hook.to_uppercase());
        let header = ["SENDER", "ENDPOINT", "VERDICT"].map(str::to_owned).into_iter();
        table.set_header(header.chain(titles).chain(["BYTES", "FIRST", "LAST"].map(str::to_owned)));
        for denial in &self.denials {
            let endpoint = denial.endpoint.clone().unwrap_or_else(|| denial.address.to_string());
            let known = [denial.sender.to_string(), endpoint, denial.verdict.to_owned()].into_iter();
            let counts =
                hooks.iter().map(|hook| denial.counts.get(hook).copied().unwrap_or_default().to_string());
            let times = [denial.first, denial.last].map(|time| format!("{time:.0}"));
            table.add_row(known.chain(counts).chain([denial.bytes.to_string()]).chain(times));
        }
        format!("{}\n", table.trim_fmt())
    }
}

impl DenialSubject {
    fn from_record(record: &DenialRecord) -> Self {
        let names: [&[u8]; 5] =
            [&record.namespace, &record.service_account, &record.label, &record.interface, &record.cgroup];
        Self {
            is_escaped: names.iter().any(|name| raw_field_text(name) != Some(&field_text(name))),
            namespace: nonempty_text(&record.namespace),
            service_account: nonempty_text(&record.service_account),
            label: nonempty_text(&record.label),
            interface: nonempty_text(&record.interface).filter(|_| record.namespace[0] == 0),
            comm: nonempty_text(&record.comm).filter(|_| record.namespace[0] == 0),
            cgroup: nonempty_text(&record.cgroup),
        }
    }

    /// Returns the subject for denials of a pod.
    pub(crate) fn of_pod(pod: &PodRef) -> Self {
        Self {
            namespace: Some(pod.namespace.clone()),
            service_account: Some(pod.service_account.clone()).filter(|account| !account.is_empty()),
            label: pod.label.clone(),
            interface: None,
            comm: None,
            cgroup: None,
            is_escaped: false,
        }
    }

    /// Returns the keys of a rule for the pods of this subject. Empty if the subject is no pod.
    pub(crate) fn pod_keys(&self) -> Vec<String> {
        let Some(namespace) = &self.namespace else { return Vec::new() };
        let key = |key: &str, text: &str| format!("{key} = {}", toml::Value::from(text));
        let account = self.service_account.as_ref().map(|account| key("service_account", account));
        let selector = self.label.as_deref().and_then(|label| label.split_once('=')).map(|(key, value)| {
            let [key, value] = [key, value].map(toml::Value::from);
            format!("pod_selector = {{ match_labels = {{ {key} = {value} }} }}")
        });
        [Some(key("namespace", namespace)), account, selector].into_iter().flatten().collect()
    }

    /// Returns the selector of a rule for this sender, and a caution if the rule also covers other senders. Returns `None` if
    /// no rule can match the sender.
    pub(super) fn rule(&self, pods: &BTreeSet<String>) -> Option<(String, Option<&'static str>)> {
        if self.is_escaped {
            return None;
        }
        let line = |key: &str, text: &str| format!("{key} = {}\n", toml::Value::from(text));
        if self.namespace.is_some() {
            let has_own_account = self.service_account.as_deref().is_some_and(|account| account != "default");
            let caution = (self.label.is_none() && !has_own_account)
                .then_some("every pod of the namespace with the default service account");
            return Some((self.pod_keys().into_iter().map(|key| key + "\n").collect(), caution));
        }
        // A test call of `imds-agent verify`.
        if self.comm.as_deref() == Some(netns::THREAD) {
            return None;
        }
        if let Some(cgroup) = &self.cgroup {
            // The kubelet removes the cgroup together with the pod.
            return (!kubepods::contains(cgroup.as_ref())).then(|| (line("cgroup", cgroup), None));
        }
        // Packets of many pods enter through a bridge. A rule for one would exempt all of them.
        let interface = self.interface.as_ref().filter(|name| pods.contains(*name))?;
        let caution = "every later pod whose interface has this name";
        Some((line("interface", &globset::escape(interface)), Some(caution)))
    }

    pub(super) fn name(&self) -> String {
        let application = self.label.as_deref().and_then(|label| Some(label.split_once('=')?.1));
        let parts: Vec<&str> = match &self.namespace {
            Some(namespace) => {
                vec![namespace, application.or(self.service_account.as_deref()).unwrap_or("all")]
            }
            None => vec![self.comm.as_deref().or(self.interface.as_deref()).unwrap_or("sender")],
        };
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        let plain = |c: char| if is_plain(c) { c } else { '-' };
        // Leaves room for a number after the name.
        parts.join("-").chars().map(plain).take(MAX_NAME - 5).collect()
    }
}

impl std::fmt::Display for DenialSubject {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self { namespace: Some(namespace), service_account, label, .. } => {
                write!(f, "{namespace}/{}", service_account.as_deref().unwrap_or("?"))?;
                label.iter().try_for_each(|label| write!(f, " {label}"))
            }
            Self { interface: Some(interface), .. } => write!(f, "interface {interface}"),
            Self { comm, cgroup, .. } => {
                write!(f, "{}", comm.as_deref().unwrap_or("unknown"))?;
                cgroup.iter().try_for_each(|cgroup| write!(f, " in {cgroup}"))
            }
        }
    }
}
