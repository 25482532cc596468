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

/// Kind of input that the agent decodes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Target {
    /// A network packet with or without an Ethernet header.
    Classify,
    /// Text of a configuration file.
    Config,
    /// Datagrams with messages of rtnetlink.
    Netlink,
    /// Events of the BPF programs, and values that are read from pinned maps.
    Records,
    /// Responses of a Kubernetes API server.
    Kubernetes,
    /// Listings of iptables and nftables, which `doctor` explains.
    Rulesets,
}

impl Target {
    /// Every target, in the order of the command line.
    pub const ALL: [Self; 6] =
        [Self::Classify, Self::Config, Self::Netlink, Self::Records, Self::Kubernetes, Self::Rulesets];

    /// Returns the name on the command line, which is also the directory of the seeds.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Classify => "classify",
            Self::Config => "config",
            Self::Netlink => "netlink",
            Self::Records => "records",
            Self::Kubernetes => "kubernetes",
            Self::Rulesets => "rulesets",
        }
    }

    /// Returns the target with this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|target| target.name() == name)
    }

    /// Decodes `bytes` as the agent does.
    ///
    /// # Panics
    ///
    /// Panics if the result violates an invariant.
    pub fn run(self, bytes: &[u8]) {
        match self {
            Self::Classify => classify::run(bytes),
            Self::Config => config::run(bytes),
            Self::Netlink => netlink::run(bytes),
            Self::Records => records::run(bytes),
            Self::Kubernetes => kubernetes::run(bytes),
            Self::Rulesets => rulesets::run(bytes),
        }
    }
}
