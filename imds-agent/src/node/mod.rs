//! What the kernel says is there.

pub mod cgroup;
pub mod kubepods;
pub mod links;
pub mod netlink;
pub mod netns;
mod process;
pub mod senders;
