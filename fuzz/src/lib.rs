//! Invariants of the decoders of imds-agent and imds-broker for arbitrary bytes. Each target decodes one kind of input and panics if an
//! invariant is violated.
//!
//! `cargo xtask fuzz` generates inputs. `cargo test` runs the inputs in `seeds`.

mod broker_match;
mod broker_request;
mod classify;
mod config;
mod kubernetes;
mod netlink;
mod records;
mod rulesets;

/// Environment variable with the name of the target.
pub const TARGET: &str = "IMDS_FUZZ_TARGET";

/// Name of a target on the command line, which is also the directory of its seeds, and a function that decodes bytes as the agent
/// does. The function panics if the result violates an invariant.
pub type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: [Target; 8] = [
    ("classify", classify::run),
    ("config", config::run),
    ("netlink", netlink::run),
    ("records", records::run),
    ("kubernetes", kubernetes::run),
    ("rulesets", rulesets::run),
    ("broker_request", broker_request::run),
    ("broker_match", broker_match::run),
];
