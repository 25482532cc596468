//! Summary of the effective configuration for `imds-agent config check`.

use std::fmt::Write as _;

use imds_ebpf_common::Hook;

use crate::config::{
    Access, Config, EndpointSelector, Environment, Exempt, RuleSubject, endpoint_set::EndpointSet,
};

/// Meaning of an empty `node.allow`.
const NO_PROCESS: &str =
    "no process of the node (node.allow is empty; without the key all of them may reach the endpoints)";
/// Meaning of an empty `metrics.listen`.
const NO_METRICS: &str = "no address: neither metrics nor health checks (metrics.listen is empty)";

/// Returns the configuration, resolved for this machine, as text that ends with a newline.
/// `pools` are the names of all pools of nodes.
pub(super) fn summary(
    config: &Config,
    endpoint_set: &EndpointSet,
    exempt: &[Exempt],
    pools: &[String],
) -> String {
    let mut text = String::new();
    let mut add = |title: &str, values: &[String]| {
        let none = ["none".to_owned()];
        let values = if values.is_empty() { &none } else { values };
        for (index, value) in values.iter().enumerate() {
            let title = if index == 0 { title } else { "" };
            // Writing to a string does not fail.
            let _ok = writeln!(text, "{title:<10} {value}");
        }
    };
    if !pools.is_empty() {
        let pool = config.pool().map_or_else(|| "none".to_owned(), str::to_owned);
        add("node pool", &[format!("{pool} (of {})", pools.join(", "))]);
    }
    add("mode", &[config.mode.name().to_owned()]);
    add("on_deny", &[config.on_deny.name().to_owned()]);
    add("errno", &[config.on_deny_errno.name().to_owned()]);
    add("provider", &[provider(endpoint_set)]);
    add("endpoints", &endpoint_set.endpoints.iter().map(ToString::to_string).collect::<Vec<_>>());
    let hooks = Hook::ALL.into_iter().filter(|&hook| config.hooks.contains(hook)).map(Hook::name);
    add("hooks", &[hooks.collect::<Vec<_>>().join(" ")]);
    if let Some(processes) = &config.node_allow {
        let processes = processes.iter().map(ToString::to_string).collect::<Vec<_>>();
        add("node allow", &or_text(processes, NO_PROCESS));
    }
    add("exempt", &exempt.iter().map(|rule| exemption(rule, endpoint_set)).collect::<Vec<_>>());
    let listen = config.listen.iter().map(ToString::to_string).collect();
    add("metrics", &or_text(listen, NO_METRICS));
    if !config.events.sinks.is_empty() {
        add("sinks", &config.events.sinks.iter().map(ToString::to_string).collect::<Vec<_>>());
    }
    add("kubernetes", &[kubernetes(config)]);
    text
}

fn or_text(values: Vec<String>, if_empty: &str) -> Vec<String> {
    if values.is_empty() { vec![if_empty.to_owned()] } else { values }
}

fn provider(endpoint_set: &EndpointSet) -> String {
    if endpoint_set.configured == endpoint_set.provider {
        endpoint_set.provider.to_owned()
    } else {
        format!("{} ({})", endpoint_set.provider, endpoint_set.configured)
    }
}

fn exemption(rule: &Exempt, endpoint_set: &EndpointSet) -> String {
    let subject = match &rule.sender {
        RuleSubject::Interface(glob) => format!("interface {glob}"),
        RuleSubject::Netns(path) => format!("netns {}", path.display()),
        RuleSubject::Cgroup(path) => format!("cgroup {}", path.display()),
        RuleSubject::Pods(pods) => {
            let account = pods.service_account.as_ref().map(|name| format!(", service account {name}"));
            let labels = pods.selector.as_ref().map(|_| ", pod selector");
            format!("{}{}{}", pods.namespace, account.unwrap_or_default(), labels.unwrap_or_default())
        }
    };
    let endpoints = match &rule.scope {
        EndpointSelector::All => "all endpoints".to_owned(),
        EndpointSelector::Only(addresses) => {
            let named =
                endpoint_set.endpoints.iter().filter(|endpoint| addresses.contains(&endpoint.address));
            named.map(|endpoint| endpoint.name.as_str()).collect::<Vec<_>>().join(" ")
        }
    };
    let audited = if rule.is_audited { ", audited" } else { "" };
    let allow = rule.allow.as_ref().map(|allow| format!(", only {}", allow.join(", "))).unwrap_or_default();
    format!("{subject} to {endpoints} (rule {}){audited}{allow}", rule.name)
}

fn kubernetes(config: &Config) -> String {
    let environment = Environment::read();
    let node = config.kubernetes.node_name(&environment);
    match config.kubernetes.access(&environment) {
        None => "no".to_owned(),
        Some(Access::InCluster) => format!("service account of the pod, node {node}"),
        Some(Access::Kubeconfig(path)) => format!("kubeconfig {}, node {node}", path.display()),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::provider::Dmi;

    fn summary_of(text: &str) -> String {
        let config = Config::parse(text, Path::new("f")).unwrap();
        let (endpoint_set, exempt) = config.resolve(&Dmi::default()).unwrap();
        summary(&config, &endpoint_set, &exempt, &[])
    }

    #[test]
    fn empty_lists_are_explained() {
        let text = summary_of("[node]\nallow = []\n[metrics]\nlisten = []");
        assert!(text.contains("\nnode allow no process of the node (node.allow is empty"), "{text}");
        assert!(text.contains("\nmetrics    no address: neither metrics nor health checks"), "{text}");
        let text = summary_of("[node]\nallow = ['uid:0']");
        assert!(
            text.contains("\nnode allow uid:0\n") && text.contains("\nmetrics    127.0.0.1:9254\n"),
            "{text}"
        );
        assert!(!summary_of("").contains("node allow"));
    }
}
