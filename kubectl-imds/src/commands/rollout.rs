//! `kubectl imds rollout status`: waits until all agents are of the newest revision and have one configuration.

use std::{
    collections::{BTreeMap, BTreeSet},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde::Serialize;
use tokio::time::{Instant, sleep_until};

use super::{
    node_status::{self, NodeStatus, Via},
    output::{Format, SCHEMA, count, exit_code, names, print, write_stderr},
};
use crate::{
    api::{
        daemon_sets::{DaemonSet, REVISION_LABEL, Revision},
        pods::Pod,
    },
    escape::escape,
    fleet::{Fleet, NodeError},
};

/// Interval at which the state is read.
const INTERVAL: Duration = Duration::from_secs(3);

/// State of a rollout.
#[derive(Debug, Serialize)]
struct Rollout {
    schema: u32,
    complete: bool,
    /// Nodes whose status was read.
    nodes: usize,
    /// Reasons why the rollout is not complete.
    waiting: Vec<String>,
}

/// Waits for the rollout. The exit code is that of a failed check if it is not complete within `timeout`.
pub(crate) async fn status(
    mut fleet: Fleet,
    via: Via,
    port: u16,
    timeout: Duration,
    format: Format,
) -> Result<ExitCode> {
    let end = Instant::now() + timeout;
    let mut last = Vec::new();
    loop {
        let next = Instant::now() + INTERVAL;
        let rollout = read(&fleet, via, port).await?;
        if rollout.complete || next >= end {
            print(format, &rollout, &fleet.limitations, Rollout::text)?;
            return Ok(exit_code(rollout.complete));
        }
        if rollout.waiting != last {
            write_stderr(&format!("waiting: {}", rollout.waiting.join("; ")));
            last = rollout.waiting;
        }
        sleep_until(next).await;
        fleet = Fleet::discover(fleet.api, fleet.selection).await.context("failed to find the agents")?;
    }
}

/// Reads revisions and pods and, once all pods are of the newest revision, the status of each node.
async fn read(fleet: &Fleet, via: Via, port: u16) -> Result<Rollout> {
    let sets = fleet.api.daemon_sets(&fleet.namespace).await.context("failed to list the DaemonSets")?;
    let revisions =
        fleet.api.revisions(&fleet.namespace).await.context("failed to list the ControllerRevisions")?;
    let sets: Vec<_> =
        sets.into_iter().filter(|set| fleet.pods.iter().any(|pod| is_owned(pod, set))).collect();
    ensure!(!sets.is_empty(), "the agents in namespace {} belong to no DaemonSet", fleet.namespace);
    let mut waiting: Vec<_> =
        sets.iter().flat_map(|set| pods_waiting(set, &revisions, &fleet.pods)).collect();
    let mut statuses = BTreeMap::new();
    if waiting.is_empty() {
        let errors = fleet
            .ask(
                |target| node_status::ask(fleet, target, via, port),
                |target, status| {
                    statuses.insert(target.pod.clone(), (target.node.clone(), status));
                },
            )
            .await;
        for set in &sets {
            let is_of_set =
                |name: &String| fleet.pods.iter().any(|pod| pod.metadata.name == *name && is_owned(pod, set));
            let of_set: Vec<_> =
                statuses.iter().filter(|(pod, _)| is_of_set(pod)).map(|(_, status)| status).collect();
            waiting.extend(nodes_waiting(&set.metadata.name, &of_set));
        }
        waiting.extend(errors.iter().map(|NodeError { node, error, .. }| format!("{node}: {error}")));
    }
    Ok(Rollout { schema: SCHEMA, complete: waiting.is_empty(), nodes: statuses.len(), waiting })
}

fn is_owned(pod: &Pod, set: &DaemonSet) -> bool {
    pod.metadata.owner_references.iter().any(|owner| owner.uid == set.metadata.uid)
}

/// Returns why the pods of a `DaemonSet` are not all of its newest revision.
fn pods_waiting(set: &DaemonSet, revisions: &[Revision], pods: &[Pod]) -> Vec<String> {
    let name = &set.metadata.name;
    let newest = Revision::newest(revisions, set);
    if set.status.observed_generation < set.metadata.generation || newest.is_none() {
        return vec![format!("DaemonSet {name}: the controller has not seen the newest revision yet")];
    }
    let (old, new): (Vec<_>, Vec<_>) = pods
        .iter()
        .filter(|pod| is_owned(pod, set) && !pod.is_terminating())
        .partition(|pod| pod.metadata.labels.get(REVISION_LABEL).map(String::as_str) != newest);
    let mut waiting = Vec::new();
    if !old.is_empty() {
        let nodes: BTreeSet<_> = old.iter().map(|pod| pod.node().unwrap_or("(not scheduled)")).collect();
        let nodes: Vec<_> = nodes.into_iter().collect();
        let pods = count(old.len(), "pod");
        waiting.push(format!("DaemonSet {name}: {pods} of an earlier revision on {}", names(&nodes)));
    }
    let desired = usize::try_from(set.status.desired_number_scheduled).unwrap_or(usize::MAX);
    if new.len() < desired {
        waiting.push(format!("DaemonSet {name}: {} of {desired} pods are of the newest revision", new.len()));
    }
    waiting
}

/// Returns why the nodes of a `DaemonSet` do not have one effective configuration.
fn nodes_waiting(name: &str, statuses: &[&(String, NodeStatus)]) -> Vec<String> {
    let nodes = |is_selected: &dyn Fn(&NodeStatus) -> bool| {
        let selected = statuses.iter().filter(|(_, status)| is_selected(status));
        selected.map(|(node, _)| node.as_str()).collect::<Vec<_>>()
    };
    let mut waiting = Vec::new();
    for (problem, found) in [
        ("not ready", nodes(&|status| !status.ready)),
        ("unloaded", nodes(&|status| status.state == "unloaded")),
        ("configuration rejected", nodes(&|status| status.config_rejected)),
        ("no hash of the configuration (earlier version)", nodes(&|status| status.config_hash.is_none())),
    ] {
        if !found.is_empty() {
            waiting.push(format!("{problem} on {}", names(&found)));
        }
    }
    // The settings of a pool are a part of the effective configuration.
    let mut by_pool = BTreeMap::<Option<&str>, BTreeMap<&str, Vec<&str>>>::new();
    for (node, status) in statuses {
        if let Some(hash) = &status.config_hash {
            by_pool.entry(status.node_pool.as_deref()).or_default().entry(hash).or_default().push(node);
        }
    }
    for (pool, by_hash) in by_pool.into_iter().filter(|(_, by_hash)| by_hash.len() > 1) {
        let groups = by_hash.iter().map(|(hash, nodes)| format!("{hash} on {}", names(nodes)));
        let groups = groups.collect::<Vec<_>>().join(", ");
        let pool = pool.map(|pool| format!(", pool {pool}")).unwrap_or_default();
        waiting.push(format!("DaemonSet {name}{pool}: configurations differ: {groups}"));
    }
    waiting
}

impl Rollout {
    fn text(&self) -> String {
        if self.complete {
            return format!(
                "rollout complete: {} have the newest revision and one configuration\n",
                count(self.nodes, "node")
            );
        }
        let lines = self.waiting.iter().map(|reason| format!("  {}\n", escape(reason)));
        format!("rollout not complete:\n{}", lines.collect::<String>())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn set(generation: i64, observed: i64, desired: u64) -> DaemonSet {
        serde_json::from_value(json!({
            "metadata": { "name": "imds-agent", "uid": "set", "generation": generation },
            "status": { "observedGeneration": observed, "desiredNumberScheduled": desired },
        }))
        .unwrap()
    }

    fn revision(owner: &str, number: i64, hash: &str) -> Revision {
        let labels = json!({ REVISION_LABEL: hash });
        serde_json::from_value(json!({
            "metadata": { "name": hash, "labels": labels, "ownerReferences": [{ "uid": owner }] },
            "revision": number,
        }))
        .unwrap()
    }

    fn pod(node: &str, hash: &str) -> Pod {
        let object: Value = json!({
            "metadata": {
                "name": node, "labels": { REVISION_LABEL: hash }, "ownerReferences": [{ "uid": "set" }],
            },
            "spec": { "nodeName": node },
        });
        serde_json::from_value(object).unwrap()
    }

    #[test]
    fn pods_of_earlier_revisions_are_waited_for() {
        let revisions = [revision("set", 1, "old"), revision("set", 2, "new"), revision("other", 3, "x")];
        let pods = [pod("a", "new"), pod("b", "old")];
        let waiting = pods_waiting(&set(2, 2, 2), &revisions, &pods);
        let expected = [
            "DaemonSet imds-agent: 1 pod of an earlier revision on b",
            "DaemonSet imds-agent: 1 of 2 pods are of the newest revision",
        ];
        assert_eq!(waiting, expected);
        assert!(pods_waiting(&set(2, 2, 1), &revisions, &pods[..1]).is_empty());
        let unseen = ["DaemonSet imds-agent: the controller has not seen the newest revision yet"];
        assert_eq!(pods_waiting(&set(3, 2, 1), &revisions, &pods[..1]), unseen);
        assert_eq!(pods_waiting(&set(2, 2, 1), &[], &pods[..1]), unseen);
    }

    #[test]
    fn configurations_must_be_equal() {
        let status = |hash: Option<&str>, is_rejected| NodeStatus {
            state: "enforcing".to_owned(),
            ready: true,
            config_hash: hash.map(str::to_owned),
            config_rejected: is_rejected,
            ..NodeStatus::default()
        };
        let of = |statuses: &[NodeStatus]| {
            let named: Vec<_> = statuses
                .iter()
                .enumerate()
                .map(|(index, status)| (format!("n{index}"), status.clone()))
                .collect();
            nodes_waiting("a", &named.iter().collect::<Vec<_>>())
        };
        assert!(of(&[status(Some("1"), false), status(Some("1"), false)]).is_empty());
        let differ = of(&[status(Some("1"), false), status(Some("2"), false)]);
        assert_eq!(differ, ["DaemonSet a: configurations differ: 1 on n0, 2 on n1"]);
        let pool =
            |hash, pool: &str| NodeStatus { node_pool: Some(pool.to_owned()), ..status(Some(hash), false) };
        assert!(of(&[pool("1", "a"), pool("2", "b")]).is_empty());
        let differ = of(&[pool("1", "a"), pool("2", "a"), pool("3", "b")]);
        assert_eq!(differ, ["DaemonSet a, pool a: configurations differ: 1 on n0, 2 on n1"]);
        assert_eq!(of(&[status(None, true)]).len(), 2);
        assert_eq!(of(&[status(Some("1"), true)]), ["configuration rejected on n0"]);
        assert_eq!(of(&[status(None, false)]), ["no hash of the configuration (earlier version) on n0"]);
        assert_eq!(of(&[NodeStatus { ready: false, ..status(Some("1"), false) }]), ["not ready on n0"]);
    }
}
