//! What the kernel says is there.

pub mod cgroup;
pub mod kubepods;
pub mod kubepods_events;
pub mod links;
pub mod netlink;
pub mod netns;
pub mod pods;

mod process;
