//! imds-agent: keeps pods and containers away from the cloud instance metadata service.
//!
//! [`cli`] is what the user calls. [`agent`] is what runs: it follows the configuration, of which [`settings`] is what it
//! comes to on this node, and hands the node's news to [`guard`], which follows its interfaces; [`state`] says what each of
//! them is and [`reconcile`] what is to be done about it, both without I/O; [`exempt`] says who is exempt; [`datapath`]
//! does it in the kernel. [`node`] is what the kernel says is there, [`kube`] what the cluster says of this node's pods. [`doctor`] says what works here, and [`verify`] proves
//! what is in force. [`server`] answers monitoring, with [`metrics`] among others; [`supervisor`] is what started the agent.
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
pub mod cli;
pub mod cluster;
pub mod collector;
pub mod config;
pub mod datapath;
pub mod denials;
pub mod diagnostics;
pub mod doctor;
pub mod endpoints;
pub mod events;
pub mod exempt;
pub mod follower;
pub mod guard;
pub mod kube;
pub mod metrics;
pub mod node;
pub mod pods;
pub mod preflight;
pub mod provider;
pub mod reconcile;
pub mod server;
pub mod settings;
pub mod startup_taint;
pub mod state;
pub mod status;
pub mod supervisor;
pub mod top;
pub mod verify;
pub mod version;
pub mod watch;
