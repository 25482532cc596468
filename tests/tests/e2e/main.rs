//! What is shipped, as it is used: the package on a machine with systemd, the image and the agent on real pods. They take
//! long, and what `cargo xtask e2e` makes first.

mod deb;
mod pods;
mod runtime;
