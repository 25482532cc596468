//! Discovery of the agents: one pod for each node, and the nodes without one.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result, bail, ensure};

use super::{Fleet, NodeError, Target};
use crate::api::{
    Api,
    pods::{Node, Pod},
};

/// Namespace of the agent if neither an option nor the kubeconfig names another one.
const NAMESPACE: &str = "imds-agent";

/// Selected agents, and limits of the requests to them.
#[derive(Clone, Debug)]
pub(crate) struct Selection {
    pub(crate) namespace: Option<String>,
    /// Label selector of the agent's pods.
    pub(crate) selector: String,
    /// Names of nodes; empty for all.
    pub(crate) nodes: BTreeSet<String>,
    /// Label selector of nodes.
    pub(crate) node_selector: Option<String>,
    pub(crate) container: String,
    /// Largest number of concurrent requests.
    pub(crate) parallel: usize,
}

/// Nodes that can be asked, and nodes that can't.
#[derive(Debug, Default)]
struct Assignment {
    targets: Vec<Target>,
    errors: Vec<NodeError>,
}

impl Fleet {
    /// Lists the agents and, if permitted, the nodes.
    pub(crate) async fn discover(api: Api, selection: Selection) -> Result<Self> {
        let (namespace, pods) = find_pods(&api, &selection).await?;
        let mut limitations = Vec::new();
        let nodes = match api.nodes(selection.node_selector.as_deref().unwrap_or_default()).await {
            Ok(nodes) => Some(nodes),
            Err(error) if error.is_forbidden() && selection.node_selector.is_none() => {
                limitations.push(format!("nodes without an agent are not shown: {error}"));
                None
            }
            Err(error) => return Err(error).context("failed to list the nodes"),
        };
        let Assignment { targets, errors } = assign(&pods, nodes.as_deref(), &selection);
        if targets.is_empty() && errors.is_empty() {
            bail!("no node matches --node or --node-selector");
        }
        Ok(Self { api, selection, namespace, targets, errors, limitations, pods })
    }

    /// Lists the pods of the agent again. Returns the nodes that can be asked.
    pub(crate) async fn rediscover(&self) -> Result<Vec<Target>> {
        let pods = self.api.pods(&self.namespace, &self.selection.selector).await?;
        let nodes = match &self.selection.node_selector {
            Some(selector) => Some(self.api.nodes(selector).await?),
            None => None,
        };
        Ok(assign(&pods, nodes.as_deref(), &self.selection).targets)
    }
}

/// Returns the agent's pods and their namespace: that of the option; otherwise `imds-agent`, and if no pod is there, that of
/// the context.
async fn find_pods(api: &Api, selection: &Selection) -> Result<(String, Vec<Pod>)> {
    let candidates = match &selection.namespace {
        Some(namespace) => vec![namespace.as_str()],
        None if api.namespace == NAMESPACE => vec![NAMESPACE],
        None => vec![NAMESPACE, &api.namespace],
    };
    let mut first_error = None;
    for namespace in &candidates {
        match api.pods(namespace, &selection.selector).await {
            Ok(pods) if !pods.is_empty() => return Ok(((*namespace).to_owned(), pods)),
            Ok(_) => {}
            Err(error) => {
                let error = anyhow::Error::from(error);
                first_error.get_or_insert(
                    error.context(format!("failed to list the pods of namespace {namespace}")),
                );
            }
        }
    }
    if let Some(error) = first_error {
        return Err(error);
    }
    let namespaces = candidates.join(" and ");
    bail!("no pod matches {:?} in namespace {namespaces}: set --namespace or --selector", selection.selector)
}

/// Assigns one pod to each selected node. `nodes` are those of the cluster that match the selector, if they are known.
fn assign(pods: &[Pod], nodes: Option<&[Node]>, selection: &Selection) -> Assignment {
    let container = &selection.container;
    let is_named = |node: &str| selection.nodes.is_empty() || selection.nodes.contains(node);
    let known: Option<BTreeSet<_>> =
        nodes.map(|nodes| nodes.iter().map(|node| node.metadata.name.as_str()).collect());
    // Without a selector, a pod on a node that the list does not contain is one of a node that was just added.
    let is_selected = |node: &str| {
        let fits = known.as_ref().is_none_or(|known| known.contains(node));
        is_named(node) && (fits || selection.node_selector.is_none())
    };
    let mut best = BTreeMap::<&str, &Pod>::new();
    let mut assignment = Assignment::default();
    for pod in pods {
        let Some(node) = pod.node() else {
            // Its node is not known.
            if selection.nodes.is_empty() && selection.node_selector.is_none() && !pod.is_terminating() {
                assignment.errors.push(NodeError {
                    node: "(not scheduled)".to_owned(),
                    pod: Some(pod.metadata.name.clone()),
                    error: format!("pod {} is not scheduled", pod.metadata.name),
                });
            }
            continue;
        };
        if is_selected(node) {
            let best = best.entry(node).or_insert(pod);
            if pod.preference(container) > best.preference(container) {
                *best = pod;
            }
        }
    }
    let expected = nodes.into_iter().flatten().filter(|node| node.should_have_agent());
    let expected = expected.map(|node| node.metadata.name.as_str()).filter(|node| is_named(node));
    let named = selection.nodes.iter().map(String::as_str);
    let missing: BTreeSet<_> = expected.chain(named).filter(|node| !best.contains_key(node)).collect();
    for node in missing {
        let error = match &known {
            Some(known) if !known.contains(node) && selection.node_selector.is_some() => continue,
            Some(known) if !known.contains(node) => "no such node",
            _ => "no pod of the agent is on this node",
        };
        assignment.errors.push(NodeError { node: node.to_owned(), pod: None, error: error.to_owned() });
    }
    for (node, pod) in best {
        let (node, name) = (node.to_owned(), pod.metadata.name.clone());
        match pod.problem(container) {
            None => assignment.targets.push(Target { node, pod: name, uid: pod.metadata.uid.clone() }),
            Some(error) => assignment.errors.push(NodeError { node, pod: Some(name), error }),
        }
    }
    assignment.errors.sort();
    assignment
}

/// Checks that a text can be a part of a URL path: the name of a namespace.
pub(crate) fn check_name(name: &str) -> Result<String> {
    let is_plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    ensure!(!name.is_empty() && name.bytes().all(is_plain), "{name:?} is not a name of a namespace");
    Ok(name.to_owned())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(name: &str, node: &Value, phase: &str, created: &str) -> Pod {
        serde_json::from_value(json!({
            "metadata": { "name": name, "uid": name, "creationTimestamp": created },
            "spec": { "nodeName": node },
            "status": { "phase": phase },
        }))
        .unwrap()
    }

    fn node(name: &str) -> Node {
        serde_json::from_value(json!({ "metadata": { "name": name } })).unwrap()
    }

    fn selection(names: &[&str]) -> Selection {
        Selection {
            namespace: None,
            selector: "app=a".to_owned(),
            nodes: names.iter().map(|&name| name.to_owned()).collect(),
            node_selector: None,
            container: "imds-agent".to_owned(),
            parallel: 1,
        }
    }

    fn texts(assignment: &Assignment) -> (Vec<&str>, Vec<(&str, &str)>) {
        let targets = assignment.targets.iter().map(|target| target.pod.as_str()).collect();
        let errors = assignment.errors.iter().map(|error| (&*error.node, &*error.error)).collect();
        (targets, errors)
    }

    #[test]
    fn each_node_gets_its_newest_running_pod() {
        let pods = [
            pod("a-old", &json!("a"), "Running", "2026-01-01T00:00:00Z"),
            pod("a-new", &json!("a"), "Running", "2026-01-02T00:00:00Z"),
            pod("a-next", &json!("a"), "Pending", "2026-01-03T00:00:00Z"),
            pod("b", &json!("b"), "Pending", "2026-01-01T00:00:00Z"),
            pod("c", &json!(null), "Pending", "2026-01-01T00:00:00Z"),
        ];
        let nodes = [node("a"), node("b"), node("d")];
        let assignment = assign(&pods, Some(&nodes), &selection(&[]));
        let expected = [
            ("(not scheduled)", "pod c is not scheduled"),
            ("b", "pod b is pending"),
            ("d", "no pod of the agent is on this node"),
        ];
        assert_eq!(texts(&assignment), (vec!["a-new"], expected.to_vec()));
    }

    #[test]
    fn named_nodes_are_selected() {
        let pods = ["a", "b"].map(|name| pod(name, &json!(name), "Running", "2026-01-01T00:00:00Z"));
        let nodes = ["a", "b", "c"].map(node);
        let assignment = assign(&pods, Some(&nodes), &selection(&["b", "c", "x"]));
        let missing = "no pod of the agent is on this node";
        assert_eq!(texts(&assignment), (vec!["b"], vec![("c", missing), ("x", "no such node")]));
        // Without a list of nodes, the plugin cannot know that a node does not exist.
        let assignment = assign(&pods, None, &selection(&["x"]));
        assert_eq!(texts(&assignment), (vec![], vec![("x", missing)]));
    }

    #[test]
    fn node_selector_excludes_other_nodes() {
        let pods = ["a", "b"].map(|name| pod(name, &json!(name), "Running", "2026-01-01T00:00:00Z"));
        let selection = Selection { node_selector: Some("pool=x".to_owned()), ..selection(&[]) };
        let assignment = assign(&pods, Some(&[node("b")]), &selection);
        assert_eq!(texts(&assignment), (vec!["b"], vec![]));
    }

    #[test]
    fn namespaces_are_names() {
        assert!(check_name("imds-agent").is_ok());
        assert!(check_name("a/../b").is_err() && check_name("").is_err());
    }
}
