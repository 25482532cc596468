//! Pod metadata that the agent needs.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::Deserialize;

use super::{
    resource::{Parsed, Resource},
    store::MAX_PODS,
};

/// Annotation of a mirror pod, which the kubelet creates in the API server for a static pod. The value is the UID of
/// the static pod on the node.
const MIRROR: &str = "kubernetes.io/config.mirror";
/// Annotation with the UID of the static pod, set by the kubelet's configuration source.
const HASH: &str = "kubernetes.io/config.hash";

/// Metadata of a pod on this node.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Pod {
    /// UID of the pod, which is never reused.
    pub uid: String,
    /// UID that names the pod's cgroups. For a static pod it differs from [`Pod::uid`].
    pub cgroup_uid: String,
    /// Creation time of the object. The API server sets it, and clients cannot choose it.
    pub created: Option<Timestamp>,
    /// Namespace in which the pod was created.
    pub namespace: String,
    /// Name, unique within the namespace.
    pub name: String,
    /// Name of the pod's service account.
    pub service_account: String,
    /// All labels of the pod, because the rules may change.
    pub labels: StringMap,
    /// True for a hostNetwork pod.
    pub host_network: bool,
    /// Container names by the container ID of the runtime.
    pub containers: StringMap,
    /// True if all containers have terminated for good (phase `Succeeded` or `Failed`).
    pub is_terminated: bool,
}

/// Change of the node's pods.
pub type PodEvent = super::ObjectEvent<Pod>;

/// Map of strings in a sorted slice. The smallest `BTreeMap` of strings takes 544 bytes, and the agent keeps two maps for
/// each pod.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct StringMap(Box<[(String, String)]>);

impl StringMap {
    /// Returns the value of `key`.
    pub fn get(&self, key: &str) -> Option<&str> {
        let index = self.0.binary_search_by(|(other, _)| other.as_str().cmp(key)).ok()?;
        self.0.get(index).map(|(_, value)| value.as_str())
    }
}

impl FromIterator<(String, String)> for StringMap {
    /// Keeps the last value of a duplicate key.
    fn from_iter<I: IntoIterator<Item = (String, String)>>(pairs: I) -> Self {
        let sorted: BTreeMap<_, _> = pairs.into_iter().collect();
        Self(sorted.into_iter().collect())
    }
}

impl Resource for Pod {
    type Object = PodObject;
    /// Name of the node whose pods are in scope.
    type Scope = String;

    const PATH: &'static str = "/api/v1/pods";
    const KIND: &'static str = "pod";
    const ALL: &'static str = "pods of this node";
    const MAX: usize = MAX_PODS;
    const METADATA_ONLY: bool = false;
    const IF_FORBIDDEN: &'static str = "";

    fn field_selector(node: &Self::Scope) -> Option<String> {
        Some(format!("spec.nodeName={node}"))
    }

    fn parse(object: Self::Object, node: &Self::Scope) -> Parsed<Self> {
        let (key, version) = (object.metadata.uid.clone(), object.metadata.resource_version.clone());
        Parsed { key, version, value: object.is_on(node).then(|| object.into_pod()) }
    }
}

/// Pod object of the API. Fields are optional, so that an incomplete object can be parsed.
#[derive(Debug, Deserialize)]
pub struct PodObject {
    metadata: Metadata,
    spec: Option<Spec>,
    status: Option<Status>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Metadata {
    uid: String,
    namespace: String,
    name: String,
    resource_version: Option<String>,
    creation_timestamp: Option<String>,
    labels: Option<BTreeMap<String, String>>,
    annotations: Option<Annotations>,
}

/// The two annotations that matter. Others can be long.
#[derive(Debug, Deserialize)]
struct Annotations {
    #[serde(rename = "kubernetes.io/config.mirror")]
    mirror: Option<String>,
    #[serde(rename = "kubernetes.io/config.hash")]
    hash: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Spec {
    node_name: Option<String>,
    service_account_name: Option<String>,
    host_network: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Status {
    phase: Option<String>,
    container_statuses: Option<Vec<ContainerStatus>>,
    init_container_statuses: Option<Vec<ContainerStatus>>,
    ephemeral_container_statuses: Option<Vec<ContainerStatus>>,
}

#[derive(Debug, Deserialize)]
struct ContainerStatus {
    name: String,
    #[serde(rename = "containerID")]
    container_id: Option<String>,
}

impl PodObject {
    /// Reports whether the pod runs on this node. A server that ignores field selectors sends all pods.
    fn is_on(&self, node: &str) -> bool {
        self.spec.as_ref().and_then(|spec| spec.node_name.as_deref()) == Some(node)
    }

    fn into_pod(self) -> Pod {
        let Metadata { uid, namespace, name, creation_timestamp, labels, annotations, .. } = self.metadata;
        let cgroup_uid = annotations.and_then(static_uid).unwrap_or_else(|| uid.clone());
        let status = self.status.unwrap_or_default();
        let is_terminated = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
        let (service_account, host_network) =
            self.spec.map_or((None, None), |spec| (spec.service_account_name, spec.host_network));
        Pod {
            uid,
            cgroup_uid,
            created: creation_timestamp.and_then(|time| time.parse().ok()),
            namespace,
            name,
            service_account: service_account.unwrap_or_default(),
            labels: labels.unwrap_or_default().into_iter().collect(),
            host_network: host_network.unwrap_or_default(),
            containers: status.containers(),
            is_terminated,
        }
    }
}

impl Status {
    fn containers(self) -> StringMap {
        [self.container_statuses, self.init_container_statuses, self.ephemeral_container_statuses]
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|ContainerStatus { name, container_id }| {
                // The ID looks like `containerd://0123…`, and is empty before the container is created.
                let (_, id) = container_id.as_ref()?.split_once("://")?;
                (!id.is_empty()).then(|| (id.to_owned(), name))
            })
            .collect()
    }
}

/// Returns the UID by which the kubelet knows a static pod: an MD5 hash in hexadecimal.
///
/// Any client that may create pods can write the annotations. A hash has no hyphens, so it never equals the UID of
/// another pod in the API server, which is a UUID. If two pods have the same hash, the index decides.
fn static_uid(Annotations { mirror, hash }: Annotations) -> Option<String> {
    let hash = hash.filter(|hash| Some(hash) == mirror.as_ref())?;
    let is_md5 = hash.len() == 32 && hash.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    if !is_md5 {
        log::debug!("ignoring {MIRROR} and {HASH}, not an MD5 hash: {hash:?}");
    }
    is_md5.then_some(hash)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const STATIC: &str = "0123456789abcdef0123456789abcdef";

    fn pod(object: Value) -> Pod {
        serde_json::from_value::<PodObject>(object).unwrap().into_pod()
    }

    #[test]
    fn pod_fields_are_read() {
        let object = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "uid": "u", "namespace": "n", "name": "p", "resourceVersion": "7", "creationTimestamp": "2026-11-23T15:04:05Z",
                "labels": { "app": "x" }, "annotations": { "a": "b" }, "managedFields": [{}],
            },
            "spec": { "nodeName": "node-0", "serviceAccountName": "s", "hostNetwork": true, "containers": [] },
            "status": {
                "phase": "Running",
                "containerStatuses": [
                    { "name": "c", "containerID": "containerd://c0" }, { "name": "waiting", "containerID": "" },
                ],
                "initContainerStatuses": [{ "name": "i", "containerID": "cri-o://c1" }, { "name": "none" }],
            },
        });
        let read: PodObject = serde_json::from_value(object).unwrap();
        assert!(read.is_on("node-0") && !read.is_on("node-1"));
        assert_eq!(read.metadata.resource_version.as_deref(), Some("7"));
        let expected = Pod {
            uid: "u".into(),
            cgroup_uid: "u".into(),
            created: Some("2026-11-23T15:04:05Z".parse().unwrap()),
            namespace: "n".into(),
            name: "p".into(),
            service_account: "s".into(),
            labels: [("app".into(), "x".into())].into_iter().collect(),
            host_network: true,
            containers: [("c0", "c"), ("c1", "i")]
                .map(|(id, name)| (id.into(), name.into()))
                .into_iter()
                .collect(),
            is_terminated: false,
        };
        assert_eq!(read.into_pod(), expected);
    }

    #[test]
    fn missing_fields_grant_nothing() {
        let metadata = json!({ "uid": "u", "namespace": "n", "name": "p" });
        let bare: PodObject = serde_json::from_value(json!({ "metadata": metadata })).unwrap();
        assert!(!bare.is_on("") && !bare.is_on("node-0"));
        for (phase, is_terminated) in [
            ("Pending", false),
            ("Running", false),
            ("Unknown", false),
            ("Succeeded", true),
            ("Failed", true),
        ] {
            let object = json!({ "metadata": metadata, "status": { "phase": phase } });
            assert_eq!(pod(object).is_terminated, is_terminated, "{phase}");
        }
        for missing in ["uid", "namespace", "name"] {
            let mut metadata = metadata.clone();
            metadata.as_object_mut().unwrap().remove(missing);
            assert!(
                serde_json::from_value::<PodObject>(json!({ "metadata": metadata })).is_err(),
                "{missing}"
            );
        }
    }

    #[test]
    fn static_pod_cgroup_name_is_unique() {
        let uid = "a3c1b0de-1f2e-4d3c-8b4a-5f6e7d8c9b0a";
        let cgroup_uid = |mirror: &str, hash: &str| {
            let annotations = json!({ MIRROR: mirror, HASH: hash });
            let metadata = json!({ "uid": uid, "namespace": "n", "name": "p", "annotations": annotations });
            pod(json!({ "metadata": metadata })).cgroup_uid
        };
        assert_eq!(cgroup_uid(STATIC, STATIC), STATIC);
        assert_eq!(cgroup_uid("", STATIC), uid);
        let another = "00000000-0000-4000-8000-000000000000";
        assert_eq!(cgroup_uid(another, another), uid);
        let upper = STATIC.to_uppercase();
        assert_eq!(cgroup_uid(&upper, &upper), uid);
    }

    #[test]
    fn keys_are_found_in_any_order() {
        let pairs = [("b", "1"), ("a", "2"), ("c", "3"), ("b", "4")];
        let map: StringMap =
            pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).into_iter().collect();
        let found = ["a", "b", "c", "d", ""].map(|key| map.get(key));
        assert_eq!(found, [Some("2"), Some("4"), Some("3"), None, None]);
        assert_eq!(StringMap::default().get("a"), None);
    }
}
