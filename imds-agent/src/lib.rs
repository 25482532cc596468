//! imds-agent: keeps pods and containers away from the cloud instance metadata service.
//!
//! [`cli`] is what the user calls. [`guard`] follows the node's interfaces; [`state`] says what each of them is and
//! [`reconcile`] what is to be done about it, both without I/O; [`datapath`] does it in the kernel. [`node`] is what
//! the kernel says is there, [`kube`] what the cluster says of this node's pods.

pub mod cli;
pub mod config;
pub mod datapath;
pub mod diagnostics;
pub mod endpoints;
pub mod events;
pub mod guard;
pub mod kube;
pub mod node;
pub mod preflight;
pub mod provider;
pub mod reconcile;
pub mod state;
pub mod status;
