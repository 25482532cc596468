//! What is shipped, as it is used: packages on a machine with systemd. They take long, and what `cargo xtask e2e`
//! makes first.

mod deb;
