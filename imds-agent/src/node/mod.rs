//! What the kernel says is there.

pub mod links;
pub mod netlink;
