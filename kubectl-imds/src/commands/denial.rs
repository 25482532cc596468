//! Denials of a node from `imds-agent report -o json`: see docs/json.md.

use std::{collections::BTreeMap, fmt};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::report::requests::NodeRequests;
use crate::fleet::{AskError, Fleet, Target, check_schema};

/// Report of a node.
#[derive(Debug, Deserialize)]
pub(super) struct ReportDocument {
    schema: u64,
    pub(super) denials: Vec<Denial>,
    /// Missing in the reports of older agents.
    #[serde(default)]
    pub(super) requests: Vec<NodeRequests>,
    /// Rules that would exempt the senders, as TOML.
    pub(super) rules: String,
}

/// Denials of one sender at one endpoint.
#[derive(Debug, Deserialize)]
pub(super) struct Denial {
    #[serde(flatten)]
    pub(super) key: DenialKey,
    /// Packets or calls by hook.
    pub(super) counts: BTreeMap<String, u64>,
    pub(super) bytes: u64,
    pub(super) first: Timestamp,
    pub(super) last: Timestamp,
}

/// Sender, endpoint and verdict. Denials with equal keys are those of one application on different nodes.
#[derive(Clone, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
pub(super) struct DenialKey {
    namespace: Option<String>,
    service_account: Option<String>,
    label: Option<String>,
    interface: Option<String>,
    comm: Option<String>,
    cgroup: Option<String>,
    endpoint: Option<String>,
    address: String,
    verdict: String,
}

impl DenialKey {
    /// Returns the sender as the agent's report names it.
    pub(super) fn sender(&self) -> impl fmt::Display {
        fmt::from_fn(|f| match self {
            Self { namespace: Some(namespace), service_account, label, .. } => {
                write!(f, "{namespace}/{}", service_account.as_deref().unwrap_or("?"))?;
                label.iter().try_for_each(|label| write!(f, " {label}"))
            }
            Self { interface: Some(interface), .. } => write!(f, "interface {interface}"),
            Self { comm, cgroup, .. } => {
                write!(f, "{}", comm.as_deref().unwrap_or("unknown"))?;
                cgroup.iter().try_for_each(|cgroup| write!(f, " in {cgroup}"))
            }
        })
    }

    pub(super) fn endpoint(&self) -> &str {
        self.endpoint.as_deref().unwrap_or(&self.address)
    }

    pub(super) fn verdict(&self) -> &str {
        &self.verdict
    }
}

/// Requests the denials of a node.
pub(super) async fn ask(fleet: &Fleet, target: &Target) -> Result<ReportDocument, AskError> {
    let document: ReportDocument = fleet.json(target, &["report", "-o", "json"]).await?;
    check_schema(document.schema)?;
    Ok(document)
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// Returns an object of `denials`.
    pub(crate) fn denial(namespace: Option<&str>, count: u64, last: &str) -> Denial {
        let key = |name: &str| namespace.map_or(Value::Null, |_| json!(name));
        serde_json::from_value(json!({
            "namespace": namespace, "service_account": key("web"), "label": key("app=web"),
            "interface": null, "comm": "curl", "cgroup": "/system.slice/a.service", "pod": null,
            "endpoint": "imds", "address": "169.254.169.254", "verdict": "denied",
            "counts": { "from_pod": count }, "bytes": 60 * count, "first": last, "last": last,
        }))
        .unwrap()
    }

    #[test]
    fn senders_are_named_as_in_the_report() {
        let time = "2026-11-23T15:04:05Z";
        assert_eq!(denial(Some("tools"), 1, time).key.sender().to_string(), "tools/web app=web");
        assert_eq!(denial(None, 1, time).key.sender().to_string(), "curl in /system.slice/a.service");
    }
}
