//! What must hold of any bytes that imds-agent reads: each target takes some, and panics where it does not.
//!
//! `cargo xtask fuzz` makes the bytes up, and `cargo test` tries those in `seeds`.

mod config;
mod judge;
mod kubernetes;
mod netlink;
mod records;
mod rulesets;

/// Names the target in the environment of the fuzzer.
pub const TARGET: &str = "IMDS_FUZZ_TARGET";

/// One kind of bytes that are read.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Target {
    /// A packet.
    Judge,
    /// A configuration.
    Config,
    /// What rtnetlink says.
    Netlink,
    /// What the programs tell, and what is read back from pinned maps.
    Records,
    /// What an API server says.
    Kubernetes,
    /// Listings of iptables and nftables, which `doctor` explains.
    Rulesets,
}

impl Target {
    /// All.
    pub const ALL: [Self; 6] =
        [Self::Judge, Self::Config, Self::Netlink, Self::Records, Self::Kubernetes, Self::Rulesets];

    /// The name on the command line and of the directory of its seeds.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Judge => "judge",
            Self::Config => "config",
            Self::Netlink => "netlink",
            Self::Records => "records",
            Self::Kubernetes => "kubernetes",
            Self::Rulesets => "rulesets",
        }
    }

    /// The one of that name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|target| target.name() == name)
    }

    /// Reads `bytes` as the agent would.
    ///
    /// # Panics
    ///
    /// Where the agent makes of them what it must not.
    pub fn run(self, bytes: &[u8]) {
        match self {
            Self::Judge => judge::run(bytes),
            Self::Config => config::run(bytes),
            Self::Netlink => netlink::run(bytes),
            Self::Records => records::run(bytes),
            Self::Kubernetes => kubernetes::run(bytes),
            Self::Rulesets => rulesets::run(bytes),
        }
    }
}
