//! Sandboxes of Kubernetes pods: maps a pod's cgroups to the identities that the datapath uses.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::MetadataExt as _,
    path::PathBuf,
};

use super::{
    link::Link,
    netlink::Netlink,
    pod_cgroups,
    process::Process,
    sender_resolver::{IdentitySet, Namespace, SenderResolver, below, pids},
};
use crate::kube::Pod;

/// Sandbox of a Kubernetes pod with at least one process.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Sandbox {
    /// Identities by which the datapath recognizes the pod.
    pub senders: IdentitySet,
    /// IDs of the pod's cgroups v2 in ascending order, with the ID of the container to which each belongs.
    pub cgroups: Box<[(u64, Option<String>)]>,
    /// ID of the pod's network namespace, if a link leads there.
    pub netns_id: Option<i32>,
}

impl Sandbox {
    /// Creates a sandbox without identities, for a pod with processes in several `cgroups` of one hierarchy.
    pub fn ambiguous(Pod { namespace, name, .. }: &Pod, cgroups: &[PathBuf]) -> Self {
        let paths: Vec<_> = cgroups.iter().map(|path| path.display().to_string()).collect();
        let mut sandbox = Self::default();
        sandbox.senders.fail(format!(
            "pod {namespace}/{name} is not exempt, because several cgroups have its UID: {}; end the processes in those \
             that the kubelet did not create",
            paths.join(", ")
        ));
        sandbox
    }

    /// Keeps the identities of `before` if an error prevented finding the interfaces, because it must not end an exemption. The
    /// identities of deleted interfaces are not in `before`, and the kernel reuses no netns cookie or cgroup id.
    pub fn keep_if_unreadable(&mut self, before: &Self) {
        let IdentitySet { interfaces, cookies, cgroups, errors, .. } = &mut self.senders;
        let has_others =
            !cookies.is_subset(&before.senders.cookies) || !cgroups.is_subset(&before.senders.cgroups);
        if !errors.is_empty() && interfaces.is_empty() && !has_others {
            let errors = std::mem::take(errors);
            self.senders = IdentitySet { errors, ..before.senders.clone() };
            self.netns_id = before.netns_id;
        }
    }

    /// Returns the IDs of the pod's cgroups v2 in ascending order.
    pub fn cgroup_ids(&self) -> impl Iterator<Item = u64> {
        self.cgroups.iter().map(|(id, _)| *id)
    }
}

impl SenderResolver {
    /// Resolves the sandbox of the Kubernetes pod that owns `cgroups`, one per hierarchy. Returns `None` if it has no
    /// sandbox yet.
    pub async fn from_pod(
        &self,
        netlink: &Netlink,
        links: &[&Link],
        cgroups: &[PathBuf],
        host_network: bool,
    ) -> Option<Sandbox> {
        let containers = containers(cgroups).into_iter().collect();
        let mut sandbox = Sandbox { cgroups: containers, ..Sandbox::default() };
        let found = match self.first_process(cgroups, host_network) {
            Ok(found) => found?,
            Err(failure) => {
                sandbox.senders.fail(failure);
                return Some(sandbox);
            }
        };
        if host_network {
            sandbox.senders.on_node = true;
            sandbox.senders.cgroups = sandbox.cgroup_ids().collect();
        } else {
            sandbox.netns_id = sandbox.senders.add(&found, "a pod", netlink, links).await;
        }
        Some(sandbox)
    }

    /// Opens the network namespace of a pod's oldest process, which the runtime started in the sandbox. A younger
    /// process may have entered another namespace. While the runtime creates a sandbox, the cgroup contains its own
    /// processes, which are still in the node's namespace.
    fn first_process(&self, cgroups: &[PathBuf], host_network: bool) -> Result<Option<Namespace>, String> {
        let unreadable = |error| format!("failed to read the processes of a pod: {error}");
        let mut are_hidden = false;
        // Each process is in a cgroup of every hierarchy, so one of them suffices.
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
                "the processes of a pod are not visible: the agent needs the node's pid namespace (hostPID)"
                    .to_owned(),
            );
        }
        Ok(None)
    }
}

/// Returns the IDs of these cgroups v2 and those below, with the containers to which they belong.
fn containers(cgroups: &[PathBuf]) -> BTreeMap<u64, Option<String>> {
    let is_v2 = |path: &&PathBuf| path.join("cgroup.controllers").exists();
    let of_pod = |pod: &PathBuf| {
        below(pod)
            .into_iter()
            .filter_map(|path| {
                // Cgroups that the container creates are below the one that is named after it.
                let first = path.strip_prefix(pod).ok()?.iter().next();
                let container = first.and_then(|name| pod_cgroups::container(name.to_str()?));
                Some((fs::metadata(&path).ok()?.ino(), container))
            })
            .collect::<Vec<_>>()
    };
    cgroups.iter().filter(is_v2).flat_map(of_pod).collect()
}

/// Returns the IDs of these cgroups v2 and of those below.
pub fn cgroup_ids(cgroups: &[PathBuf]) -> BTreeSet<u64> {
    containers(cgroups).into_keys().collect()
}

/// Reports whether one of these cgroups, or one below, has a visible process.
pub fn is_populated(cgroups: &[PathBuf]) -> bool {
    cgroups.iter().flat_map(|cgroup| below(cgroup)).any(|path| !pids(&path.join("cgroup.procs")).is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unreadable_pod_keeps_its_identities() {
        let senders = IdentitySet { interfaces: [7].into(), cookies: [9].into(), ..IdentitySet::default() };
        let known = Sandbox { senders, netns_id: Some(1), ..Sandbox::default() };
        let mut unreadable = Sandbox::default();
        unreadable.senders.fail("too many open files");
        let mut found = unreadable.clone();
        found.keep_if_unreadable(&known);
        assert_eq!((&found.senders.interfaces, found.netns_id), (&known.senders.interfaces, Some(1)));
        assert_eq!(found.senders.errors, unreadable.senders.errors);
        // Another namespace: nothing of the earlier one stays.
        let mut other = unreadable.clone();
        other.senders.cookies.insert(10);
        let expected = other.clone();
        other.keep_if_unreadable(&found);
        assert_eq!(other, expected);
        let mut empty = Sandbox::default();
        empty.keep_if_unreadable(&known);
        assert_eq!(empty, Sandbox::default());
    }
}
