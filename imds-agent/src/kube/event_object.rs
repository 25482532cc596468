//! Event objects of the API group `events.k8s.io/v1`.

use jiff::Timestamp;
use serde_json::{Value, json};

/// Controller of the agent's Events, which `kubectl describe` shows in the column From.
const CONTROLLER: &str = "imds-agent";
/// Largest length of a note in bytes that the API server accepts.
const MAX_NOTE: usize = 1024;
/// Largest length of an object's name in bytes (RFC 1123 subdomain).
const MAX_NAME: usize = 253;

/// Object that an Event is about.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Regarding {
    /// A pod.
    Pod {
        /// Namespace of the pod.
        namespace: String,
        /// Name of the pod.
        name: String,
        /// UID of the pod.
        uid: String,
    },
    /// The node of the agent.
    Node(String),
}

/// Event to create.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct NewEvent {
    /// Object that the Event is about.
    pub regarding: Regarding,
    /// True for the type `Warning`, false for `Normal`.
    pub is_warning: bool,
    /// Reason in one CamelCase word.
    pub reason: &'static str,
    /// Action in one CamelCase word.
    pub action: &'static str,
    /// Text for people. The end of a longer text than the API server accepts is cut.
    pub note: String,
    /// Time of the first observation.
    pub time: Timestamp,
    /// Observations until now.
    pub series: EventSeries,
}

/// Number of observations of an Event.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct EventSeries {
    /// Number of observations.
    pub count: u64,
    /// Time of the last observation.
    pub last: Timestamp,
}

impl NewEvent {
    /// Returns the namespace of the Event.
    pub(super) fn namespace(&self) -> &str {
        match &self.regarding {
            Regarding::Pod { namespace, .. } => namespace,
            // As client-go does for objects without a namespace.
            Regarding::Node(_) => "default",
        }
    }

    /// Returns the name of the Event: the name of the object and the time, as in client-go.
    pub(super) fn name(&self) -> String {
        let (Regarding::Pod { name, .. } | Regarding::Node(name)) = &self.regarding;
        let suffix = format!(".{:x}", self.time.as_nanosecond());
        let start = name.get(..MAX_NAME - suffix.len()).unwrap_or(name);
        // Each part between dots must end with a letter or a digit.
        start.trim_end_matches(['-', '.']).to_owned() + &suffix
    }

    /// Returns the object that the agent of `node` creates.
    pub(super) fn to_json(&self, node: &str) -> Value {
        let regarding = match &self.regarding {
            Regarding::Pod { namespace, name, uid } => {
                json!({ "apiVersion": "v1", "kind": "Pod", "namespace": namespace, "name": name, "uid": uid })
            }
            // `kubectl describe node` finds the Events whose uid is the name, as the kubelet writes it.
            Regarding::Node(name) => {
                json!({ "apiVersion": "v1", "kind": "Node", "name": name, "uid": name })
            }
        };
        json!({
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": { "namespace": self.namespace(), "name": self.name() },
            "eventTime": micro_time(self.time),
            "reportingController": CONTROLLER,
            "reportingInstance": node,
            "type": if self.is_warning { "Warning" } else { "Normal" },
            "reason": self.reason,
            "action": self.action,
            "note": self.note.get(..self.note.floor_char_boundary(MAX_NOTE)).unwrap_or_default(),
            "regarding": regarding,
            // The API server accepts a series from two observations on.
            "series": (self.series.count > 1).then(|| self.series.to_json()),
        })
    }
}

impl EventSeries {
    pub(super) fn to_json(self) -> Value {
        let count = i32::try_from(self.count).unwrap_or(i32::MAX);
        json!({ "count": count, "lastObservedTime": micro_time(self.last) })
    }
}

/// Formats a time as `metav1.MicroTime`.
fn micro_time(time: Timestamp) -> String {
    format!("{time:.6}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(name: String, count: u64) -> NewEvent {
        let time: Timestamp = "2026-11-30T10:00:00.123456789Z".parse().unwrap();
        NewEvent {
            regarding: Regarding::Pod { namespace: "web".into(), name, uid: "u".into() },
            is_warning: true,
            reason: "MetadataAccessDenied",
            action: "Deny",
            note: "é".repeat(600),
            time,
            series: EventSeries { count, last: time },
        }
    }

    #[test]
    fn single_and_repeated_events() {
        let single = event("api-0".into(), 1).to_json("node-0");
        assert_eq!(single["eventTime"], "2026-11-30T10:00:00.123456Z");
        assert_eq!(single["metadata"]["name"], "api-0.18ecca50e04f0d15");
        assert_eq!(single["note"].as_str().unwrap().len(), 1024);
        assert_eq!((&single["series"], &single["reportingInstance"]), (&Value::Null, &"node-0".into()));
        let repeated = event("api-0".into(), u64::MAX).to_json("node-0");
        assert_eq!(repeated["series"]["count"], i32::MAX);
    }

    #[test]
    fn names_are_valid_subdomains() {
        for name in ["a".repeat(253), format!("{}-{}", "a".repeat(235), "b".repeat(17))] {
            let name = event(name, 1).name();
            assert!(name.len() <= MAX_NAME, "{name}");
            assert!(!name.contains("-."), "{name}");
        }
    }
}
