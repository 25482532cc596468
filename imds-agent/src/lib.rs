//! imds-agent: blocks access of pods and containers to the cloud instance metadata service.
//!
//! [`cli`] is the command line. [`agent`] is the event loop: it loads the configuration with [`config_loader`],
//! resolves it for this node with [`settings`], and passes the node's events to [`reconciler`], which reconciles the
//! interfaces. [`start_config`] chooses the configuration at the start, from [`last_good`] if the file is broken.
//! [`state`] assigns roles to interfaces and [`reconcile`] plans the actions, both without I/O. [`exempt`] computes the
//! exemptions, and [`datapath`] writes to the kernel. [`node`] reads the node's links, cgroups and processes, [`kube`]
//! watches the pods of this node. [`doctor`] checks the features of this node, and [`verify`] tests enforcement.
//! [`telemetry`] serves health and metrics, the latter from [`metrics`]. [`systemd`] notifies the service manager.
//! [`logging`] writes the log, and [`escape`] makes untrusted text safe for every output.
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

mod checksum;
pub mod cli;
pub mod config;
pub mod controller;
pub mod datapath;
pub mod diagnose;
pub mod escape;
pub mod kube;
pub mod node;
pub mod telemetry;
pub mod version;
