//! State of the node, read from the kernel: interfaces, routes, network namespaces, cgroups and processes.

pub mod cgroup;
pub(crate) mod confinement;
mod datagram;
mod dump_socket;
mod event_stream;
pub mod file_watch;
pub mod interface_role;
pub mod kubepods;
pub mod link;
mod link_dump;
pub mod link_event;
pub(crate) mod mounts;
pub mod namespace_paths;
pub mod netlink;
pub mod netns;
pub mod node_processes;
pub mod pod_cgroups;
pub mod pod_namespaces;
mod process;
mod route_dump;
pub mod sandbox;
pub mod sender_resolver;
pub(crate) mod userspace_ovs;
