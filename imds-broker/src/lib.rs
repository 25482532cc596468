//! Scoped exemptions: requests that a pod may make to a metadata service, and the messages between agent and broker.
//!
//! The agent uses this crate to check the configuration and to talk to the broker. The broker is the program `imds-broker`.

pub mod allow;
pub mod protocol;
