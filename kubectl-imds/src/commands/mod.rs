//! The subcommands, each with the pure functions for its output.

pub(crate) mod compare;
mod denial;
pub(crate) mod events;
mod exposition;
pub(crate) mod node_status;
pub(crate) mod output;
pub(crate) mod report;
pub(crate) mod rollout;
pub(crate) mod rules;
pub(crate) mod status;
pub(crate) mod top;
pub(crate) mod verify;
