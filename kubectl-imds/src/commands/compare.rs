//! `kubectl imds compare`: nodes that differ in version, configuration or enforcement.

use std::{collections::BTreeMap, fmt::Write as _, process::ExitCode};

use anyhow::Result;
use serde::Serialize;

use super::{
    node_status::{self, NodeStatus, Via},
    output::{Columns, Format, SCHEMA, count, errors_text, exit_code, names, print},
    status::limitations,
};
use crate::{
    escape::escape,
    fleet::{Fleet, NodeError},
};

/// Compared properties of a node, by name. A property that the source does not have is missing.
type Properties = BTreeMap<&'static str, String>;

/// Groups of nodes with equal properties.
#[derive(Debug, Serialize)]
struct Comparison {
    schema: u32,
    /// The largest group is first. The others are compared with it.
    groups: Vec<Group>,
    errors: Vec<NodeError>,
    limitations: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Group {
    nodes: Vec<String>,
    properties: Properties,
    /// Names of the properties in which the group differs from the largest one.
    differences: Vec<&'static str>,
}

/// Prints the groups. The exit code is that of a failed check unless all nodes answered and are equal.
pub(crate) async fn compare(fleet: &Fleet, via: Via, port: u16, format: Format) -> Result<ExitCode> {
    let mut groups = BTreeMap::<Properties, Vec<String>>::new();
    let errors = fleet
        .ask(
            |target| node_status::ask(fleet, target, via, port),
            |target, status| groups.entry(properties(&status)).or_default().push(target.node.clone()),
        )
        .await;
    let report = Comparison::new(groups, errors, limitations(fleet, via));
    let is_equal = report.groups.len() <= 1 && report.errors.is_empty();
    print(format, &report, &report.limitations, Comparison::table)?;
    Ok(exit_code(is_equal))
}

fn properties(status: &NodeStatus) -> Properties {
    let list = |items: &Vec<String>| if items.is_empty() { "none".to_owned() } else { items.join("; ") };
    let cgroup_hooks = status.cgroup_hooks.iter().map(|(hook, is_attached)| {
        let state = if *is_attached { "attached" } else { "not attached" };
        format!("{hook} {state}")
    });
    let attached = if status.attached >= status.attachments { "all" } else { "not all" };
    let known = [
        ("version", Some(status.version.clone())),
        ("state", Some(status.state.clone())),
        ("mode", Some(status.mode.clone().unwrap_or_else(|| "none".to_owned()))),
        ("on_deny", status.on_deny.clone()),
        ("provider", status.provider.clone()),
        ("endpoints", status.endpoints.as_ref().map(list)),
        ("hooks", Some(list(&status.hooks))),
        ("cgroup_hooks", Some(list(&cgroup_hooks.collect()))),
        ("interfaces_attached", Some(attached.to_owned())),
        ("node_pool", status.node_pool.clone()),
        ("ready", Some(status.ready.to_string())),
        ("config_hash", Some(status.config_hash.clone().unwrap_or_else(|| "unknown".to_owned()))),
        ("config_rejected", Some(status.config_rejected.to_string())),
    ];
    known.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
}

impl Comparison {
    fn new(
        groups: BTreeMap<Properties, Vec<String>>,
        errors: Vec<NodeError>,
        limitations: Vec<String>,
    ) -> Self {
        let mut groups: Vec<_> = groups.into_iter().collect();
        for (_, nodes) in &mut groups {
            nodes.sort();
        }
        // The order of equally large groups is that of their properties, so that each run prints the same.
        groups.sort_by_key(|(_, nodes)| std::cmp::Reverse(nodes.len()));
        let reference = groups.first().map(|(properties, _)| properties.clone()).unwrap_or_default();
        let groups = groups.into_iter().map(|(properties, nodes)| {
            let names = properties.keys().chain(reference.keys());
            let mut differences: Vec<_> =
                names.copied().filter(|name| properties.get(name) != reference.get(name)).collect();
            differences.sort_unstable();
            differences.dedup();
            Group { nodes, properties, differences }
        });
        Self { schema: SCHEMA, groups: groups.collect(), errors, limitations }
    }

    fn table(&self) -> String {
        let Some((reference, others)) = self.groups.split_first() else {
            return errors_text(&self.errors);
        };
        let mut text = String::new();
        let total: usize = self.groups.iter().map(|group| group.nodes.len()).sum();
        let of = if others.is_empty() { "all".to_owned() } else { reference.nodes.len().to_string() };
        // Writing to a string does not fail.
        let _ok = writeln!(text, "{of} of {} are equal:\n", count(total, "node"));
        for (name, value) in &reference.properties {
            let _ok = writeln!(text, "  {name:<19} {}", escape(value));
        }
        if !others.is_empty() {
            let mut columns = Columns::new(["NODES", "DIFFERENCE", "VALUE", "REFERENCE"]);
            for group in others {
                let nodes = names(&group.nodes);
                for (index, name) in group.differences.iter().enumerate() {
                    let [value, other] = [&group.properties, &reference.properties]
                        .map(|properties| properties.get(name).map_or("-", String::as_str));
                    columns.add([if index == 0 { &*nodes } else { "" }, *name, value, other]);
                }
            }
            text += "\ndifferent nodes:\n\n";
            text += &columns.finish();
        }
        text + &errors_text(&self.errors)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(mode: &str, hash: Option<&str>) -> NodeStatus {
        NodeStatus {
            version: "0.1.0".to_owned(),
            state: "enforcing".to_owned(),
            ready: true,
            mode: Some(mode.to_owned()),
            config_hash: hash.map(str::to_owned),
            ..NodeStatus::default()
        }
    }

    fn compared(statuses: &[(&str, NodeStatus)]) -> Comparison {
        let mut groups = BTreeMap::<_, Vec<_>>::new();
        for (node, status) in statuses {
            groups.entry(properties(status)).or_default().push((*node).to_owned());
        }
        Comparison::new(groups, Vec::new(), Vec::new())
    }

    #[test]
    fn largest_group_is_the_reference() {
        let report = compared(&[
            ("c", status("audit", Some("2"))),
            ("b", status("enforce", Some("1"))),
            ("a", status("enforce", Some("1"))),
        ]);
        let [reference, other] = &report.groups[..] else { panic!("{report:?}") };
        assert_eq!(
            (&reference.nodes[..], reference.differences.len()),
            (&["a".to_owned(), "b".to_owned()][..], 0)
        );
        assert_eq!(other.differences, ["config_hash", "mode"]);
        let table = report.table();
        assert!(table.starts_with("2 of 3 nodes are equal:\n"), "{table}");
        let rows: Vec<_> = table.lines().skip_while(|line| !line.contains("DIFFERENCE")).collect();
        assert_eq!(
            rows,
            [
                " NODES  DIFFERENCE   VALUE  REFERENCE",
                " c      config_hash  2      1",
                "        mode         audit  enforce",
            ]
        );
    }

    #[test]
    fn missing_properties_are_no_difference() {
        let [a, b] = ["a", "b"].map(|node| (node, status("enforce", None)));
        let report = compared(&[a, b]);
        assert_eq!(report.groups.len(), 1);
        assert!(!report.groups[0].properties.contains_key("on_deny"));
        assert!(report.table().starts_with("all of 2 nodes are equal:\n"));
    }
}
