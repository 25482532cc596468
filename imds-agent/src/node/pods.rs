//! From a pod's id to what the datapath knows it by, without the container runtime: its cgroups, a process in them, its
//! network namespace, the links that lead there.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use thiserror::Error;

use super::{
    kubepods::{PodCgroups, Tree},
    links::{Kind, Link},
    netlink::{Netlink, NetlinkError},
    netns,
    process::Process,
};

/// How deep a container's own cgroups are followed.
const MAX_DEPTH: usize = 8;

/// A pod that is to be found.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Wanted {
    /// The id that its cgroups are named after.
    pub cgroup_uid: String,
    /// Whether it is meant to be in the node's network namespace. Before a sandbox is what it will be, its processes are
    /// there, too.
    pub host_network: bool,
}

/// What the kernel knows a pod by.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ResolvedPod {
    /// The id that its cgroups are named after.
    pub uid: String,
    /// Inode number of its network namespace.
    pub netns_inode: u64,
    /// Cookie of its network namespace; `None` for the node's, and where an older kernel has none to tell.
    pub netns_cookie: Option<u64>,
    /// The node's interfaces whose other end is in its network namespace.
    pub ifindexes: Vec<u32>,
    /// Ids of its cgroups v2.
    pub cgroup_ids: Vec<u64>,
    /// Whether its network namespace is the node's.
    pub host_network: bool,
}

/// Why a pod can't be found. One that has no sandbox yet is none of these.
#[derive(Debug, Error)]
pub enum ResolveError {
    /// What there is to know of its processes can't be read.
    #[error("can't look at the processes of pod {uid}")]
    Processes {
        /// The pod.
        uid: String,
        /// What the system said.
        source: io::Error,
    },
    /// It has processes that are in another pid namespace than the agent.
    #[error("can't see the processes of pod {uid}: the agent needs the node's pid namespace (hostPID)")]
    Hidden {
        /// The pod.
        uid: String,
    },
    /// Its network namespace can't be entered.
    #[error("can't enter the network namespace of pod {uid}")]
    Enter {
        /// The pod.
        uid: String,
        /// What the system said.
        source: io::Error,
    },
}

/// Finds pods on this node.
///
/// It takes the node's pid namespace, `CAP_SYS_PTRACE` to open the namespaces of processes of other users, and
/// `CAP_SYS_ADMIN` to enter them.
#[derive(Debug)]
pub struct Resolver {
    proc: PathBuf,
    tree: Tree,
    node_netns: u64,
}

/// A pod with processes.
#[derive(Debug)]
struct Found {
    cgroup_ids: Vec<u64>,
    /// `None` is the node's.
    netns: Option<(File, u64)>,
}

impl Resolver {
    /// A resolver for the node whose network namespace is the calling thread's. `proc` is where its procfs is mounted,
    /// `cgroup` where its cgroup hierarchies are, or the one of them.
    pub fn new(proc: &Path, cgroup: &Path) -> io::Result<Self> {
        Self::for_node(proc, cgroup, netns::this_inode()?.into())
    }

    fn for_node(proc: &Path, cgroup: &Path, node_netns: u64) -> io::Result<Self> {
        Ok(Self { proc: proc.to_owned(), tree: Tree::open(cgroup)?, node_netns })
    }

    /// The kubelet's cgroups, where it was last looked for them.
    #[must_use]
    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    /// Finds those of `wanted` that there are. One that is missing from the answer has no sandbox yet, or none any more.
    ///
    /// An interface's index is the pod's for as long as the interface exists, the other numbers for as long as its
    /// namespace and its cgroup do.
    pub async fn resolve(
        &mut self,
        netlink: &Netlink,
        wanted: &[Wanted],
    ) -> Result<Vec<Result<ResolvedPod, ResolveError>>, NetlinkError> {
        let found = self.find(wanted);
        let mut resolved = Vec::with_capacity(found.len());
        let mut links = None;
        for (uid, found) in found {
            let Found { cgroup_ids, netns } = match found {
                Ok(found) => found,
                Err(error) => {
                    resolved.push(Err(error));
                    continue;
                }
            };
            let mut pod = ResolvedPod {
                uid,
                netns_inode: self.node_netns,
                netns_cookie: None,
                ifindexes: Vec::new(),
                cgroup_ids,
                host_network: netns.is_none(),
            };
            if let Some((file, inode)) = netns {
                pod.netns_inode = inode;
                pod.netns_cookie = match netns::cookie_of(&file) {
                    Ok(cookie) => cookie,
                    Err(source) => {
                        resolved.push(Err(ResolveError::Enter { uid: pod.uid, source }));
                        continue;
                    }
                };
                // As long as the file is open the namespace is there, and its id no other's.
                if let Some(id) = netlink.netns_id(&file).await? {
                    let links = match &mut links {
                        Some(links) => links,
                        none => none.insert(netlink.links().await?),
                    };
                    pod.ifindexes = leading_to(id, links);
                }
            }
            resolved.push(Ok(pod));
        }
        Ok(resolved)
    }

    fn find(&mut self, wanted: &[Wanted]) -> Vec<(String, Result<Found, ResolveError>)> {
        let mut cgroups = self.tree.pods();
        if wanted.iter().any(|pod| !cgroups.contains_key(&pod.cgroup_uid)) {
            // The kubelet may have moved, and what it left behind be there still.
            self.tree.find_roots();
            cgroups = self.tree.pods();
        }
        let mut found = Vec::new();
        for Wanted { cgroup_uid, host_network } in wanted.iter().collect::<BTreeSet<_>>() {
            let Some(pod) = cgroups.remove(cgroup_uid) else { continue };
            if let Some(result) = self.find_pod(cgroup_uid, *host_network, pod).transpose() {
                found.push((cgroup_uid.clone(), result));
            }
        }
        found
    }

    fn find_pod(
        &self,
        uid: &str,
        host_network: bool,
        PodCgroups { paths, ids }: PodCgroups,
    ) -> Result<Option<Found>, ResolveError> {
        let unreadable = |source| ResolveError::Processes { uid: uid.to_owned(), source };
        let mut is_hidden = false;
        // Each process is in a cgroup of every hierarchy, so that one will do.
        for path in paths {
            let members = members(&path);
            is_hidden |= members.contains_key(&0);
            let mut processes = Vec::new();
            for (pid, procs) in members {
                if let Some(process) = Process::open(&self.proc, pid).map_err(unreadable)? {
                    processes.push((process.started, pid, procs, process));
                }
            }
            // The oldest is the one that the runtime made the sandbox with. A younger one may have gone elsewhere, into a
            // namespace that the exemption is not for.
            processes.sort_by_key(|(started, pid, ..)| (*started, *pid));
            for (_, pid, procs, process) in processes {
                let Some(netns) = process.netns().map_err(unreadable)? else { continue };
                let inode = netns.metadata().map_err(unreadable)?.ino();
                // A runtime's own processes are in the pod's cgroup, too, and in the node's namespace.
                if (inode == self.node_netns) != host_network {
                    continue;
                }
                // The file was read by a number. If the process still has it and the cgroup the process, it always did.
                if !pids(&procs).contains(&pid) || !process.is_alive().map_err(unreadable)? {
                    continue;
                }
                let netns = (!host_network).then_some((netns, inode));
                return Ok(Some(Found { cgroup_ids: ids, netns }));
            }
        }
        if is_hidden { Err(ResolveError::Hidden { uid: uid.to_owned() }) } else { Ok(None) }
    }
}

/// The links whose other end is in the namespace with this id.
fn leading_to(id: i32, links: &[Link]) -> Vec<u32> {
    let is_pair = |link: &&Link| matches!(link.kind, Kind::Veth | Kind::Netkit);
    links.iter().filter(is_pair).filter(|link| link.peer_netns == Some(id)).map(|link| link.index).collect()
}

/// The processes in a cgroup and below, each with the file that says so.
fn members(cgroup: &Path) -> BTreeMap<u32, PathBuf> {
    let mut members = BTreeMap::new();
    let mut level = vec![cgroup.to_owned()];
    for _ in 0..MAX_DEPTH {
        let mut next = Vec::new();
        for path in level {
            let procs = path.join("cgroup.procs");
            members.extend(pids(&procs).into_iter().map(|pid| (pid, procs.clone())));
            let entries = fs::read_dir(&path).into_iter().flatten().flatten();
            let is_directory = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
            next.extend(entries.filter(is_directory).map(|entry| entry.path()));
        }
        level = next;
    }
    members
}

/// None of a cgroup that is gone, or that is a threaded one: its processes are its parent's.
fn pids(procs: &Path) -> Vec<u32> {
    let text = fs::read_to_string(procs).unwrap_or_default();
    text.lines().filter_map(|line| line.parse().ok()).collect()
}

#[cfg(test)]
mod tests;
