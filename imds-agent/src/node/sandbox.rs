//! The sandboxes of Kubernetes pods: from a pod's cgroups to what the datapath knows it by.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::MetadataExt as _,
    path::PathBuf,
};

use super::{
    links::Link,
    netlink::Netlink,
    pod_cgroups,
    process::Process,
    senders::{Finder, Namespace, Senders, below, pids},
};
use crate::kube::Pod;

/// A pod of Kubernetes that has processes.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Sandbox {
    /// What the datapath knows it by.
    pub senders: Senders,
    /// Ids of its cgroups v2, and of each the id of the container whose it is.
    pub cgroups: BTreeMap<u64, Option<String>>,
    /// The id of its network namespace, where a link leads there.
    pub netns_id: Option<i32>,
}

impl Sandbox {
    /// The sandbox of a pod with processes in several `cgroups` of one hierarchy: nothing is known of it.
    #[must_use]
    pub fn ambiguous(Pod { namespace, name, .. }: &Pod, cgroups: &[PathBuf]) -> Self {
        let paths: Vec<_> = cgroups.iter().map(|path| path.display().to_string()).collect();
        let mut sandbox = Self::default();
        sandbox.senders.fail(format!(
            "pod {namespace}/{name} is not exempt, because several cgroups have its id: {}; end the processes in those \
             that the kubelet did not create",
            paths.join(", ")
        ));
        sandbox
    }
}

impl Finder {
    /// The pod of Kubernetes whose cgroups these are, one in each of some hierarchies; `None` where it has no sandbox yet.
    pub async fn pod(
        &self,
        netlink: &Netlink,
        links: &[&Link],
        cgroups: &[PathBuf],
        host_network: bool,
    ) -> Option<Sandbox> {
        let mut sandbox = Sandbox { cgroups: containers(cgroups), ..Sandbox::default() };
        let found = match self.first_process(cgroups, host_network) {
            Ok(found) => found?,
            Err(failure) => {
                sandbox.senders.fail(failure);
                return Some(sandbox);
            }
        };
        if host_network {
            sandbox.senders.cgroups = sandbox.cgroups.keys().copied().collect();
        } else {
            sandbox.netns_id = sandbox.senders.add(&found, "a pod", netlink, links).await;
        }
        Some(sandbox)
    }

    /// The network namespace of a pod's oldest process: the runtime made the sandbox with it. A younger one may have gone
    /// elsewhere, into a namespace that is not the pod's. Before a sandbox is what it will be, there are the runtime's own
    /// processes, in the node's namespace.
    fn first_process(&self, cgroups: &[PathBuf], host_network: bool) -> Result<Option<Namespace>, String> {
        let unreadable = |error| format!("can't look at the processes of a pod: {error}");
        let mut are_hidden = false;
        // Each process is in a cgroup of every hierarchy, so that one will do.
        for cgroup in cgroups {
            let mut processes = Vec::new();
            for procs in below(cgroup).into_iter().map(|directory| directory.join("cgroup.procs")) {
                are_hidden |= fs::read_to_string(&procs).is_ok_and(|text| text.lines().any(|pid| pid == "0"));
                for pid in pids(&procs) {
                    let Some(process) = Process::open(pid).map_err(unreadable)? else { continue };
                    let Some(started) = process.started().map_err(unreadable)? else { continue };
                    processes.push((started, pid, procs.clone()));
                }
            }
            processes.sort();
            for (_, pid, procs) in processes {
                let Some(namespace) = Self::netns_of(pid, &procs).map_err(unreadable)? else { continue };
                if (namespace.inode == self.node) == host_network {
                    return Ok(Some(namespace));
                }
            }
        }
        if are_hidden {
            return Err(
                "can't see the processes of a pod: the agent needs the node's pid namespace (hostPID)"
                    .to_owned(),
            );
        }
        Ok(None)
    }
}

/// Ids of the cgroups v2 among these and below them, and the containers whose they are.
fn containers(cgroups: &[PathBuf]) -> BTreeMap<u64, Option<String>> {
    let is_v2 = |path: &&PathBuf| path.join("cgroup.controllers").exists();
    let of_pod = |pod: &PathBuf| {
        below(pod)
            .into_iter()
            .filter_map(|path| {
                // The container's own cgroups are below the one that is named after it.
                let first = path.strip_prefix(pod).ok()?.iter().next();
                let container = first.and_then(|name| pod_cgroups::container(name.to_str()?));
                Some((fs::metadata(&path).ok()?.ino(), container))
            })
            .collect::<Vec<_>>()
    };
    cgroups.iter().filter(is_v2).flat_map(of_pod).collect()
}

/// Ids of the cgroups v2 among these and below them.
#[must_use]
pub fn cgroup_ids(cgroups: &[PathBuf]) -> BTreeSet<u64> {
    containers(cgroups).into_keys().collect()
}

/// Whether a process that can be seen is in one of these cgroups or below.
#[must_use]
pub fn is_inhabited(cgroups: &[PathBuf]) -> bool {
    cgroups.iter().flat_map(|cgroup| below(cgroup)).any(|path| !pids(&path.join("cgroup.procs")).is_empty())
}
