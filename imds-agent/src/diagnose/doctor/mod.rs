//! `imds-agent doctor`: checks kernel features by trying them, and reports other programs and firewall rules, with remedies.
//!
//! Attaches no program to the interfaces and cgroups of the node, and changes no rule.

mod address_range;
mod cgroup_programs;
mod chains;
mod coverage;
mod doctor_report;
mod environment;
mod explained;
mod firewall;
mod hooked_interfaces;
mod iptables_rule;
mod kernel_features;
mod metadata_programs;
mod nft_rule;
mod node_allow_coverage;
mod node_pairs;
mod number_set;
mod observed_gaps;
mod open_vswitch;
mod qdiscs;
mod redirects;
mod rulesets;
mod tc_programs;
mod traffic;

pub(crate) use self::doctor_report::DoctorReport;
pub use self::doctor_report::{DoctorCheck, Rule};
use self::{coverage::Enforcement, doctor_report::State, observed_gaps::ObservedGaps, rulesets::Rulesets};
use imds_ebpf_common::Mode;

use crate::{
    config::provider::Provider,
    datapath::{DatapathError, pin::dir::PinDir},
    diagnose::devices,
    node::netlink::Netlink,
    version::VERSION,
};

/// Schema version of the JSON output. Removed and changed fields increase it.
const SCHEMA: u32 = 1;

/// Explains the rules in the output of `iptables-save` or `nft --json`, for a node that protects the endpoints of `provider`
/// in this mode with the default hooks.
pub fn explain_rules(listing: &str, provider: &Provider, mode: Mode) -> Vec<DoctorCheck> {
    let rulesets = Rulesets::from_listing(listing);
    firewall::rules(&rulesets, &Enforcement::from_provider(provider, Some(mode)))
}

pub(crate) async fn run_checks(pins: &PinDir, netlink: &Netlink) -> Result<DoctorReport, DatapathError> {
    let mut checks = vec![
        kernel_features::release(),
        kernel_features::btf(),
        environment::bpffs(pins),
        environment::cgroup2(),
        environment::capabilities(),
        environment::security_modules(),
        environment::locked_memory(),
        kernel_features::jit(),
        kernel_features::attaching(),
        kernel_features::netns_cookie(),
        kernel_features::netns_cookie_tc(),
        kernel_features::netns_cookie_cgroup_skb(),
        kernel_features::ring_buffer(),
        kernel_features::ipv6(),
        environment::pods(pins),
        environment::agent(pins),
    ];
    checks.extend(explained::check(pins));
    let devices = devices::list(netlink).await?;
    checks.extend(tc_programs::check_interfaces(pins, netlink, &devices).await?);
    checks.extend(qdiscs::checks(pins, netlink).await?);
    checks.extend(node_pairs::checks(pins, netlink).await?);
    checks.push(open_vswitch::datapath(netlink).await?);
    checks.extend(cgroup_programs::programs(pins)?);
    checks.extend(metadata_programs::checks(netlink).await?);
    let rulesets = Rulesets::list();
    let enforcement =
        Enforcement { gaps: ObservedGaps::read(pins, netlink).await, ..Enforcement::read(pins) };
    checks.extend(firewall::rules(&rulesets, &enforcement));
    checks.extend(redirects::checks(&rulesets, pins, netlink).await?);
    Ok(DoctorReport {
        schema: SCHEMA,
        version: VERSION,
        pin_dir: pins.root().to_owned(),
        ready: checks.iter().all(|check| check.state != State::Missing),
        checks,
    })
}
