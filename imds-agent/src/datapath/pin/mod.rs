//! The pin directory: owner, lock, contents and removal.

pub mod agents;
pub(crate) mod contents;
pub mod dir;
pub mod lock;
pub mod mount_namespace;
pub mod netns_owner;
pub(crate) mod removal;
pub(crate) mod rollback;
pub(crate) mod unload;
pub(crate) mod unload_request;
