//! imds-agent: keeps pods and containers away from the cloud instance metadata service.
//!
//! [`cli`] is the command line. [`agent`] runs: it loads the configuration with [`config_loader`], applies it to this node by
//! [`settings`], and passes the node's events to [`guard`], which follows the interfaces. [`start_config`] chooses the
//! configuration of a start, from [`last_good`] if the file is broken. [`state`] assigns roles to interfaces and [`reconcile`]
//! plans the changes, both without I/O. [`exempt`] finds exempt pods, and [`datapath`] writes to the kernel. [`node`] reads the
//! node's links, cgroups and processes, [`kube`] the cluster's pods of this node. [`doctor`] reports the features of this
//! node, and [`verify`] proves enforcement. [`server`] answers monitoring, with [`metrics`] among others. [`supervisor`] talks
//! to the service manager. [`logging`] writes the log, and [`escape`] makes text from outside safe for every
//! output.
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

pub mod agent;
mod checksum;
pub mod cli;
pub mod cluster;
pub mod config;
pub mod config_loader;
pub mod datapath;
pub mod denials;
pub mod diagnostics;
pub mod doctor;
pub mod endpoints;
pub mod escape;
pub mod events;
pub mod exempt;
pub mod follower;
pub mod guard;
pub mod kube;
pub mod last_good;
pub mod logging;
pub mod metrics;
pub mod node;
pub mod pods;
pub mod preflight;
pub mod provider;
pub mod reconcile;
pub mod settings;
pub mod start_config;
pub mod startup_taint;
pub mod state;
pub mod status;
pub mod supervisor;
pub mod telemetry;
pub mod top;
pub mod verify;
pub mod version;
pub mod watch;
