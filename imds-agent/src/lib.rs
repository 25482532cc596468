//! imds-agent: blocks access of pods and containers to the cloud instance metadata service.
//!
//! Modules import only modules above them in this list:
//!
//! - [`config`] parses and resolves the configuration file.
//! - [`kube`] watches the pods of this node.
//! - [`node`] reads links, routes, cgroups and processes from the kernel, without decisions.
//! - [`datapath`] loads the BPF programs, and reads and writes attachments, maps and pins.
//! - [`telemetry`] reports: status, metrics, events, denials and logs.
//! - [`diagnose`] examines the node (`doctor`) and tests enforcement (`verify`).
//! - [`controller`] compares desired with observed state, and reconciles. It does not import [`diagnose`].
//! - [`cli`] has one module for each subcommand.
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

mod causes;
mod checksum;
pub mod cli;
pub mod config;
pub mod controller;
pub mod datapath;
pub mod diagnose;
mod encode;
pub mod kube;
mod memory;
pub mod node;
pub mod telemetry;
pub mod version;

use imds_escape as escape;
