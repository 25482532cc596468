//! Pods as the datapath and the outputs name them.

use std::fmt;

use jiff::Timestamp;
use serde::Serialize;

use super::pod::Pod;

/// Pod and container that a subject of the datapath stands for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct PodContainer<'p> {
    /// Pod to which the subject belongs.
    pub pod: &'p Pod,
    /// Name of the container, if the subject is the cgroup of one.
    pub container: Option<&'p str>,
}

/// Metadata of a pod for output. The agent records it so that other processes can name the pod. The JSON form only ever
/// gains fields.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub struct PodRef {
    /// Namespace in which the pod was created.
    pub namespace: String,
    /// Name of the pod, without the namespace.
    pub pod: String,
    /// Name of the pod's service account.
    pub service_account: String,
    /// Name of the container, if it is known.
    pub container: Option<String>,
    /// Label that names the application, as `key=value`.
    pub label: Option<String>,
    /// UID of the pod, which is never reused.
    pub uid: String,
}

impl fmt::Display for PodRef {
    /// Formats as `namespace/pod`, or `namespace/pod[container]` if the container is known.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.pod)?;
        self.container.iter().try_for_each(|container| write!(f, "[{container}]"))
    }
}

/// Status of the pod watch. The JSON form only ever gains fields.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct PodWatchStatus {
    /// Name of the node in the cluster.
    pub node: String,
    /// True while the API server answers the watch.
    pub connected: bool,
    /// Time of the last change of `connected`.
    pub since: Timestamp,
    /// Time of the last moment at which the set of pods was known to be complete.
    pub synced_at: Option<Timestamp>,
    /// Time of the last error of the watch.
    pub failed_at: Option<Timestamp>,
    /// Last error of the watch.
    pub error: Option<String>,
    /// Number of pods that the API server listed.
    pub pods: u32,
    /// Number of known pods whose sandbox was not found.
    pub unresolved: u32,
    /// Number of pods that claim the cgroup of another pod.
    pub disputed: u32,
    /// Status of the namespace watch, if a rule needs one.
    pub namespaces: Option<NamespaceWatchStatus>,
}

/// Status of the namespace watch. The JSON form only ever gains fields.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct NamespaceWatchStatus {
    /// True while the API server answers the watch.
    pub connected: bool,
    /// Number of namespaces that the API server listed.
    pub known: u32,
    /// Last error of the watch.
    pub error: Option<String>,
}
