//! Objects that the agent writes: Events and conditions of nodes.

use std::{collections::btree_map::Entry, net::TcpStream, time::Instant};

use serde_json::{Value, json};

use super::{
    ApiServer, Shared, Store,
    requests::{respond, respond_status},
};

const JSON: &str = "Content-Type: application/json\r\n";

impl ApiServer {
    /// Answers requests for targets that start with `prefix` with status 403 from now on.
    pub fn forbid(&self, prefix: &'static str) {
        self.shared.lock().forbidden.push(prefix);
    }

    /// Removes all effects of [`ApiServer::forbid`].
    pub fn permit_all(&self) {
        self.shared.lock().forbidden.clear();
    }

    /// Closes the connection instead of answering the next requests that write Events, `count` of them. They take effect.
    pub fn lose_event_answers(&self, count: usize) {
        self.shared.lock().lost_event_answers = count;
    }

    /// Returns all Events in the order of their namespaces and names.
    #[must_use]
    pub fn events(&self) -> Vec<Value> {
        self.shared.lock().events.values().cloned().collect()
    }

    /// Returns the Events about an object with this reason.
    #[must_use]
    pub fn events_about(&self, name: &str, reason: &str) -> Vec<Value> {
        let is_about = |event: &Value| event["regarding"]["name"] == name && event["reason"] == reason;
        self.events().into_iter().filter(is_about).collect()
    }

    /// Deletes all Events, as the API server does after an hour.
    pub fn expire_events(&self) {
        self.shared.lock().events.clear();
    }

    /// Returns the times of the requests that created or patched an Event.
    #[must_use]
    pub fn event_writes(&self) -> Vec<Instant> {
        self.shared.lock().event_writes.clone()
    }

    /// Returns a condition of a node.
    #[must_use]
    pub fn condition(&self, node: &str, kind: &str) -> Option<Value> {
        self.shared.lock().conditions.get(&(node.to_owned(), kind.to_owned())).cloned()
    }
}

impl Shared {
    /// Creates an Event, or patches the Event `name`.
    pub(super) fn event(&self, stream: &TcpStream, namespace: &str, name: &str, body: &[u8]) -> Option<()> {
        let body: Value = serde_json::from_slice(body).ok()?;
        let mut store = self.lock();
        let result = store.write_event(namespace, name, &body);
        if let Some(left) = store.lost_event_answers.checked_sub(1) {
            store.lost_event_answers = left;
            return None;
        }
        drop(store);
        match result {
            Ok((code, event)) => respond(stream, code, JSON, &event.to_string()),
            Err((code, message)) => respond_status(stream, code, message),
        }
    }

    /// Returns a node object, after a strategic merge patch of its conditions.
    pub(super) fn node_status(&self, stream: &TcpStream, node: &str, patch: &[u8]) -> Option<()> {
        let mut store = self.lock();
        if !patch.is_empty() {
            let patch: Value = serde_json::from_slice(patch).ok()?;
            for condition in patch["status"]["conditions"].as_array()? {
                let key = (node.to_owned(), condition["type"].as_str()?.to_owned());
                store.conditions.insert(key, condition.clone());
            }
        }
        let of_node = store.conditions.iter().filter(|((other, _), _)| other == node);
        let conditions: Vec<_> = of_node.map(|(_, condition)| condition).collect();
        let status = json!({ "conditions": conditions });
        let object = json!({ "kind": "Node", "metadata": { "name": node }, "status": status });
        drop(store);
        respond(stream, 200, JSON, &object.to_string())
    }
}

impl Store {
    fn write_event(
        &mut self,
        namespace: &str,
        name: &str,
        body: &Value,
    ) -> Result<(u16, Value), (u16, &'static str)> {
        self.event_writes.push(Instant::now());
        if name.is_empty() {
            check_event(body, namespace).map_err(|message| (422, message))?;
            let name = body["metadata"]["name"].as_str().unwrap_or_default().to_owned();
            return match self.events.entry((namespace.to_owned(), name)) {
                Entry::Occupied(_) => Err((409, "events already exists")),
                Entry::Vacant(entry) => Ok((201, entry.insert(body.clone()).clone())),
            };
        }
        let event = self.events.get_mut(&(namespace.to_owned(), name.to_owned()));
        let event = event.ok_or((404, "events not found"))?;
        let has_other_keys = body.as_object().is_none_or(|object| object.keys().any(|key| key != "series"));
        if has_other_keys || !is_series(&body["series"]) {
            return Err((422, "only the series of an event can change"));
        }
        event["series"] = body["series"].clone();
        Ok((200, event.clone()))
    }
}

/// Checks an Event like `pkg/apis/core/validation/events.go` of Kubernetes.
fn check_event(event: &Value, namespace: &str) -> Result<(), &'static str> {
    let text = |pointer: &str| event.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
    let is_set = |pointer: &str, longest: usize| (1..=longest).contains(&text(pointer).len());
    let is_cluster_scoped = text("/regarding/namespace").is_empty() && namespace == "default";
    let series = &event["series"];
    if !is_cluster_scoped && text("/regarding/namespace") != namespace {
        Err("regarding.namespace: does not match event.namespace")
    } else if !is_micro_time(&event["eventTime"]) {
        Err("eventTime: required")
    } else if !is_set("/reportingController", 253) || !is_set("/reportingInstance", 128) {
        Err("reportingController, reportingInstance: required")
    } else if !is_set("/action", 128) || !is_set("/reason", 128) || !is_set("/note", 1024) {
        Err("action, reason, note: required, limited in length")
    } else if !["Normal", "Warning"].contains(&text("/type")) {
        Err("type: not Normal or Warning")
    } else if !series.is_null() && !is_series(series) {
        Err("series: needs a count of at least 2 and a lastObservedTime")
    } else {
        Ok(())
    }
}

fn is_series(series: &Value) -> bool {
    series["count"].as_i64().is_some_and(|count| count >= 2) && is_micro_time(&series["lastObservedTime"])
}

/// Reports whether a value looks like `2026-11-30T10:00:00.123456Z`.
fn is_micro_time(value: &Value) -> bool {
    value
        .as_str()
        .is_some_and(|text| text.len() == 27 && text.ends_with('Z') && text.get(10..11) == Some("T"))
}
