//! kubectl plugin for all agents of a cluster: `kubectl imds`.
//!
//! Modules import only modules above them in this list:
//!
//! - [`api`] lists pods and nodes, and runs commands in pods.
//! - [`fleet`] asks many nodes at the same time.
//! - [`commands`] has one module for each subcommand, with pure functions for what it prints.
//! - [`cli`] defines the command line.
#![cfg_attr(
    not(test),
    deny(
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::string_slice,
        clippy::todo,
        clippy::unimplemented,
        clippy::unreachable,
        clippy::unwrap_used
    )
)]

mod api;
pub mod cli;
mod commands;
mod fleet;

use imds_escape as escape;
