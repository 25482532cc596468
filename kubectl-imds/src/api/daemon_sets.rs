//! `DaemonSets` of the agent, and their revisions.

use serde::Deserialize;

use super::{Api, ApiError, pods::Metadata};

const JSON: &str = "application/json";
/// Label of pods and revisions with the hash of the pod template.
pub(crate) const REVISION_LABEL: &str = "controller-revision-hash";

/// A `DaemonSet` with the fields that a rollout depends on.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct DaemonSet {
    pub(crate) metadata: Metadata,
    #[serde(default)]
    pub(crate) status: DaemonSetStatus,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct DaemonSetStatus {
    pub(crate) desired_number_scheduled: u64,
    pub(crate) observed_generation: i64,
}

/// A revision of a `DaemonSet`.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Revision {
    pub(crate) metadata: Metadata,
    revision: i64,
}

impl Revision {
    /// Returns the hash of the newest revision of a `DaemonSet`.
    pub(crate) fn newest<'r>(revisions: &'r [Self], daemon_set: &DaemonSet) -> Option<&'r str> {
        let is_own = |revision: &&Self| {
            revision.metadata.owner_references.iter().any(|owner| owner.uid == daemon_set.metadata.uid)
        };
        let newest = revisions.iter().filter(is_own).max_by_key(|revision| revision.revision)?;
        newest.metadata.labels.get(REVISION_LABEL).map(String::as_str)
    }
}

impl Api {
    /// Lists the `DaemonSets` of a namespace.
    pub(crate) async fn daemon_sets(&self, namespace: &str) -> Result<Vec<DaemonSet>, ApiError> {
        let mut sets = Vec::new();
        let path = format!("/apis/apps/v1/namespaces/{namespace}/daemonsets");
        self.list(&path, JSON, &[], |set| sets.push(set)).await?;
        Ok(sets)
    }

    /// Lists the revisions in a namespace.
    pub(crate) async fn revisions(&self, namespace: &str) -> Result<Vec<Revision>, ApiError> {
        let mut revisions = Vec::new();
        let path = format!("/apis/apps/v1/namespaces/{namespace}/controllerrevisions");
        self.list(&path, JSON, &[], |revision| revisions.push(revision)).await?;
        Ok(revisions)
    }
}
