//! Pods of the agent, and nodes of the cluster.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::Deserialize;

use super::{Api, ApiError};

const JSON: &str = "application/json";
/// Only the metadata of objects: a node lists its images, and is therefore long.
const METADATA: &str = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1,application/json";

/// A pod of the agent, with the fields that the plugin reads.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Pod {
    pub(crate) metadata: Metadata,
    #[serde(default)]
    spec: PodSpec,
    #[serde(default)]
    status: PodStatus,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Metadata {
    pub(crate) name: String,
    pub(crate) namespace: String,
    pub(crate) uid: String,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) generation: i64,
    creation_timestamp: Option<Timestamp>,
    deletion_timestamp: Option<Timestamp>,
    pub(crate) owner_references: Vec<Owner>,
}

#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Owner {
    pub(crate) uid: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct PodSpec {
    node_name: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct PodStatus {
    phase: String,
    container_statuses: Vec<ContainerStatus>,
}

#[derive(Clone, Debug, Deserialize)]
struct ContainerStatus {
    name: String,
    #[serde(default)]
    state: ContainerState,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct ContainerState {
    waiting: Option<Reason>,
    terminated: Option<Reason>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Reason {
    reason: String,
}

impl Pod {
    /// Returns the node of the pod; `None` if the pod is not scheduled.
    pub(crate) fn node(&self) -> Option<&str> {
        self.spec.node_name.as_deref().filter(|node| !node.is_empty())
    }

    pub(crate) fn is_terminating(&self) -> bool {
        self.metadata.deletion_timestamp.is_some()
    }

    /// Returns why no command can run in the container of the pod.
    pub(crate) fn problem(&self, container: &str) -> Option<String> {
        let name = &self.metadata.name;
        if self.status.phase != "Running" {
            let phase = if self.status.phase.is_empty() { "unknown" } else { &self.status.phase };
            return Some(format!("pod {name} is {}", phase.to_lowercase()));
        }
        let state = self.status.container_statuses.iter().find(|status| status.name == container)?;
        let with_reason =
            |state: &str, Reason { reason }: &Reason| format!("pod {name}: {container} is {state}: {reason}");
        let ContainerState { waiting, terminated } = &state.state;
        let waiting = waiting.as_ref().map(|reason| with_reason("waiting", reason));
        waiting.or_else(|| terminated.as_ref().map(|reason| with_reason("terminated", reason)))
    }

    /// Returns the order in which pods of one node are preferred: those that run, then those that stay, then the newest.
    pub(crate) fn preference(&self, container: &str) -> (bool, bool, Option<Timestamp>) {
        (self.problem(container).is_none(), !self.is_terminating(), self.metadata.creation_timestamp)
    }
}

/// A node that should have an agent.
#[derive(Debug, Deserialize)]
pub(crate) struct Node {
    pub(crate) metadata: Metadata,
}

impl Node {
    /// Reports whether a `DaemonSet` of the agent runs on the node: on no other operating system, and on no virtual node.
    pub(crate) fn should_have_agent(&self) -> bool {
        let label = |name: &str| self.metadata.labels.get(name).map(String::as_str);
        label("kubernetes.io/os").is_none_or(|system| system == "linux")
            && label("type") != Some("virtual-kubelet")
            && label("virtual-kubelet.io/provider").is_none()
            && label("eks.amazonaws.com/compute-type") != Some("fargate")
    }
}

impl Api {
    /// Lists the pods of a namespace that match a label selector.
    pub(crate) async fn pods(&self, namespace: &str, selector: &str) -> Result<Vec<Pod>, ApiError> {
        let mut pods = Vec::new();
        let path = format!("/api/v1/namespaces/{namespace}/pods");
        self.list(&path, JSON, &[("labelSelector", selector)], |pod| pods.push(pod)).await?;
        Ok(pods)
    }

    /// Lists the nodes that match a label selector.
    pub(crate) async fn nodes(&self, selector: &str) -> Result<Vec<Node>, ApiError> {
        let mut nodes = Vec::new();
        self.list("/api/v1/nodes", METADATA, &[("labelSelector", selector)], |node| nodes.push(node)).await?;
        Ok(nodes)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(status: &Value) -> Pod {
        let object = json!({ "metadata": { "name": "a" }, "spec": { "nodeName": "n" }, "status": status });
        serde_json::from_value(object).unwrap()
    }

    #[test]
    fn pod_without_commands_has_a_problem() {
        let waiting = json!({ "waiting": { "reason": "CrashLoopBackOff" } });
        let statuses = json!([{ "name": "imds-agent", "state": waiting }]);
        for (status, expected) in [
            (json!({ "phase": "Running" }), None),
            (json!({ "phase": "Pending" }), Some("pod a is pending")),
            (json!({}), Some("pod a is unknown")),
            (
                json!({ "phase": "Running", "containerStatuses": statuses }),
                Some("pod a: imds-agent is waiting: CrashLoopBackOff"),
            ),
        ] {
            assert_eq!(pod(&status).problem("imds-agent").as_deref(), expected);
        }
    }

    #[test]
    fn virtual_and_windows_nodes_have_no_agent() {
        let node = |labels: Value| -> Node {
            serde_json::from_value(json!({ "metadata": { "name": "n", "labels": labels } })).unwrap()
        };
        assert!(node(json!({})).should_have_agent());
        assert!(node(json!({ "kubernetes.io/os": "linux" })).should_have_agent());
        assert!(!node(json!({ "kubernetes.io/os": "windows" })).should_have_agent());
        assert!(!node(json!({ "type": "virtual-kubelet" })).should_have_agent());
        assert!(!node(json!({ "eks.amazonaws.com/compute-type": "fargate" })).should_have_agent());
    }
}
