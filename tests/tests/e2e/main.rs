//! Shipped artifacts in use: the package on a machine with systemd, and the image and the agent with real pods. The
//! tests take long and need artifacts that `cargo xtask e2e` builds first.

mod cloud_init;
mod deb_package;
mod pods;
mod runtime;
