//! State of the node, read from the kernel: interfaces, routes, network namespaces, cgroups and processes.

pub mod cgroup;
pub mod kubepods;
pub mod links;
pub(crate) mod mounts;
pub mod netlink;
pub mod netns;
pub mod pod_cgroups;
mod process;
pub mod sandbox;
pub mod senders;
