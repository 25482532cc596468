//! Invariants of imds-agent's decoders for arbitrary bytes. Each target decodes one kind of input and panics if an
//! invariant is violated.
//!
//! `cargo xtask fuzz` generates inputs. `cargo test` runs the inputs in `seeds`.

mod classify;
mod config;
mod kubernetes;
mod netlink;
mod records;
mod rulesets;

/// Environment variable with the name of the target.
pub const TARGET: &str = "IMDS_FUZZ_TARGET";

/// Each target by its name on the command line, which is also the directory of its seeds. A target decodes bytes as the agent
/// does, and panics if the result violates an invariant.
pub const TARGETS: [(&str, fn(&[u8])); 6] = [
    ("classify", classify::run),
    ("config", config::run),
    ("netlink", netlink::run),
    ("records", records::run),
    ("kubernetes", kubernetes::run),
    ("rulesets", rulesets::run),
];
