//! `imds-agent doctor`: checks kernel features by trying them, and reports other programs and firewall rules, with remedies.
//!
//! Attaches no program to the interfaces and cgroups of the node, and changes no rule.

mod address_range;
mod cgroups;
mod chains;
mod coverage;
mod devices;
mod firewall;
mod iptables_rule;
mod kernel;
mod mark_rules;
mod marks;
mod metadata_programs;
mod nft_rule;
mod node_pairs;
mod number_set;
mod place;
mod programs;
mod report;
mod rulesets;
mod traffic;

pub use self::report::{DoctorCheck, DoctorReport, MarkWriter, Program, Rule, State};
use self::{coverage::Enforcement, marks::MarkUse, rulesets::Rulesets};
use imds_ebpf_common::Mode;

use crate::{
    datapath::{DatapathError, pins::PinDir},
    node::netlink::Netlink,
    provider::Provider,
    version::VERSION,
};

/// Schema version of the JSON output. Fields are only added while it stays the same.
const SCHEMA: u32 = 1;

/// Explains the rules in the output of `iptables-save` or `nft --json`, for a node that protects the endpoints of `provider`
/// in this mode with the default hooks.
#[must_use]
pub fn explain_rules(listing: &str, provider: &Provider, mode: Mode) -> Vec<DoctorCheck> {
    let rulesets = Rulesets::from_listing(listing);
    let mut checks = firewall::rules(&rulesets, &Enforcement::of_provider(provider, Some(mode)));
    checks.extend(marks::rules(&rulesets, &MarkUse::default()));
    checks
}

/// Runs all checks on this node.
pub async fn examine(pins: &PinDir, netlink: &Netlink) -> Result<DoctorReport, DatapathError> {
    let mut checks = vec![
        kernel::release(),
        kernel::btf(),
        place::bpffs(pins),
        place::cgroup2(),
        place::capabilities(),
        place::locked_memory(),
        kernel::jit(),
        kernel::attaching(),
        kernel::netns_cookie(),
        kernel::netns_cookie_tc(),
        kernel::netns_cookie_cgroup_skb(),
        kernel::ring_buffer(),
        kernel::ipv6(),
        place::pods(pins),
        place::agent(pins),
    ];
    let devices = devices::list(netlink).await?;
    let mark = MarkUse::read(pins, &devices);
    checks.extend(programs::of_interfaces(pins, netlink, &devices, &mark).await?);
    checks.extend(node_pairs::checks(pins, netlink).await?);
    checks.extend(cgroups::programs(pins)?);
    checks.extend(metadata_programs::checks(netlink).await?);
    let rulesets = Rulesets::list();
    checks.extend(firewall::rules(&rulesets, &Enforcement::read(pins)));
    checks.extend(marks::rules(&rulesets, &mark));
    checks.extend(marks::tunnels(&devices, &mark));
    Ok(DoctorReport {
        schema: SCHEMA,
        version: VERSION,
        pin_dir: pins.root().to_owned(),
        ready: checks.iter().all(|check| check.state != State::Missing),
        checks,
    })
}
