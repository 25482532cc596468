//! `kubectl imds rules`: the exemption rules of all nodes, and how many senders they match.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    process::ExitCode,
};

use anyhow::Result;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::output::{Columns, Format, SCHEMA, count, errors_text, exit_code, print};
use crate::fleet::{AskError, Fleet, NodeError, check_schema};

/// Output of `imds-agent config show -o json`, with the keys that the plugin reads.
#[derive(Debug, Deserialize)]
struct ConfigDocument {
    #[serde(default)]
    exempt: Vec<BTreeMap<String, Value>>,
}

/// Output of `imds-agent status -o json`, with the fields that the plugin reads.
#[derive(Debug, Deserialize)]
struct StatusDocument {
    schema: u64,
    exemptions: Vec<ExemptSender>,
}

#[derive(Debug, Deserialize)]
struct ExemptSender {
    rule: String,
    interface: Option<String>,
    netns_cookie: Option<u64>,
    cgroup: Option<u64>,
}

/// Exemption rules of all nodes.
#[derive(Debug, Serialize)]
struct FleetRules {
    schema: u32,
    /// Nodes that answered.
    nodes: usize,
    rules: Vec<Rule>,
    errors: Vec<NodeError>,
    limitations: Vec<String>,
}

/// A rule. Rules with one name that differ between nodes are separate.
#[derive(Debug, Serialize)]
struct Rule {
    name: String,
    /// Keys of the rule in the configuration file; null if a sender is exempt by a rule that is no longer in it.
    keys: Option<BTreeMap<String, Value>>,
    /// Nodes that have the rule.
    nodes: usize,
    /// Nodes on which the rule matches a sender.
    matching_nodes: usize,
    /// Interfaces, network namespaces and cgroups that the rule exempts, on all nodes.
    senders: usize,
}

/// Rules by name and keys, in JSON.
#[derive(Debug, Default)]
struct Merged {
    nodes: usize,
    rules: BTreeMap<(String, String), Rule>,
}

/// Prints the rules of all nodes. The exit code is that of a failed check unless all nodes answered.
pub(crate) async fn rules(fleet: &Fleet, format: Format) -> Result<ExitCode> {
    let mut merged = Merged::default();
    let errors = fleet
        .ask(
            async |target| {
                let status: StatusDocument = fleet.json(target, &["status", "-o", "json"]).await?;
                check_schema(status.schema)?;
                let config: ConfigDocument = fleet.json(target, &["config", "show", "-o", "json"]).await?;
                Ok::<_, AskError>((config, status))
            },
            |_, (config, status)| merged.add(config, status),
        )
        .await;
    let report = FleetRules {
        schema: SCHEMA,
        nodes: merged.nodes,
        rules: merged.rules.into_values().collect(),
        errors,
        limitations: fleet.limitations.clone(),
    };
    print(format, &report, &report.limitations, FleetRules::table)?;
    Ok(exit_code(report.errors.is_empty()))
}

impl Merged {
    fn add(
        &mut self,
        ConfigDocument { exempt }: ConfigDocument,
        StatusDocument { exemptions, .. }: StatusDocument,
    ) {
        self.nodes += 1;
        // A sender is listed once for each endpoint.
        let mut senders = BTreeMap::<String, BTreeSet<_>>::new();
        for ExemptSender { rule, interface, netns_cookie, cgroup } in exemptions {
            senders.entry(rule).or_default().insert((interface, netns_cookie, cgroup));
        }
        for mut keys in exempt {
            let name = match keys.remove("name") {
                Some(Value::String(name)) => name,
                _ => "?".to_owned(),
            };
            let matched = senders.remove(&name).map_or(0, |senders| senders.len());
            self.add_rule(name, Some(keys), matched);
        }
        for (name, senders) in senders {
            self.add_rule(name, None, senders.len());
        }
    }

    fn add_rule(&mut self, name: String, keys: Option<BTreeMap<String, Value>>, senders: usize) {
        let text = keys.as_ref().and_then(|keys| serde_json::to_string(keys).ok()).unwrap_or_default();
        let empty = Rule { name: name.clone(), keys, nodes: 0, matching_nodes: 0, senders: 0 };
        let rule = self.rules.entry((name, text)).or_insert(empty);
        rule.nodes += 1;
        rule.matching_nodes += usize::from(senders > 0);
        rule.senders += senders;
    }
}

impl FleetRules {
    fn table(&self) -> String {
        let nodes = count(self.nodes, "node");
        if self.rules.is_empty() {
            return format!("no exemption rules on {nodes}\n{}", errors_text(&self.errors));
        }
        let mut columns = Columns::new(["RULE", "SELECTOR", "ENDPOINTS", "NODES", "MATCHING", "SENDERS"]);
        for rule in &self.rules {
            columns.add([
                rule.name.clone(),
                rule.selector(),
                rule.endpoints(),
                rule.nodes.to_string(),
                rule.matching_nodes.to_string(),
                rule.senders.to_string(),
            ]);
        }
        let mut text = columns.finish();
        // Writing to a string does not fail.
        let _ok = writeln!(text, "\n{} on {nodes}", count(self.rules.len(), "rule"));
        text + &errors_text(&self.errors)
    }
}

impl Rule {
    fn selector(&self) -> String {
        let Some(keys) = &self.keys else { return "(no longer in the configuration)".to_owned() };
        let keys = keys.iter().filter(|(key, _)| *key != "endpoints");
        let text = keys.map(|(key, value)| match value {
            Value::String(text) => format!("{key}={text}"),
            other => format!("{key}={other}"),
        });
        text.collect::<Vec<_>>().join(" ")
    }

    fn endpoints(&self) -> String {
        match self.keys.as_ref().and_then(|keys| keys.get("endpoints")) {
            Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" "),
            _ => "all".to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn node(exempt: &Value, senders: &[(&str, u64)]) -> (ConfigDocument, StatusDocument) {
        let sender = |(rule, cgroup): &(&str, u64)| json!({ "rule": rule, "interface": null, "netns_cookie": null, "cgroup": cgroup });
        let status = json!({ "schema": 1, "exemptions": senders.iter().map(sender).collect::<Vec<_>>() });
        let config = json!({ "mode": "enforce", "exempt": exempt });
        (serde_json::from_value(config).unwrap(), serde_json::from_value(status).unwrap())
    }

    #[test]
    fn rules_are_counted_by_node() {
        let rule = json!([{ "name": "a", "namespace": "x", "endpoints": ["imds", "dns"] }]);
        let mut merged = Merged::default();
        let mut add = |(config, status)| merged.add(config, status);
        add(node(&rule, &[("a", 1), ("a", 1), ("a", 2)]));
        add(node(&rule, &[]));
        add(node(&json!([{ "name": "a", "namespace": "y" }]), &[("a", 1), ("3", 7)]));
        let report = FleetRules {
            schema: SCHEMA,
            nodes: merged.nodes,
            rules: merged.rules.into_values().collect(),
            errors: Vec::new(),
            limitations: Vec::new(),
        };
        let expected = " RULE  SELECTOR                          ENDPOINTS  NODES  MATCHING  SENDERS
 3     (no longer in the configuration)  all        1      1         1
 a     namespace=x                       imds dns   2      1         2
 a     namespace=y                       all        1      1         1

3 rules on 3 nodes
";
        assert_eq!(report.table(), expected);
    }
}
