//! Scoped exemptions: requests that a pod may make to a metadata service, and the messages between agent and broker.
//!
//! The agent uses this crate to check the configuration and to talk to the broker. The program `imds-broker` parses
//! requests of pods with [`request`], and forwards those that an [`allow::Rule`] allows and the [`provider`] knows.

pub mod allow;
pub mod canonical;
pub mod protocol;
pub mod provider;
pub mod request;
