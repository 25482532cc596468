//! Selection of tests, and number of their repetitions.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use imds_tests::SCALE;

use super::{payload::Payload, selinux_policy::Policy, tools::Tools};

/// Percentage of repetitions in an emulated machine.
const SCALE_PERCENT: u32 = 25;
/// Percentage of repetitions with `--quick`.
const QUICK_SCALE_PERCENT: u32 = 5;
/// Tests of `--quick`, by executable and parts of their names. They cover each hook alone and all hooks, the verifier
/// on every program, replies, IPv6, and devices that only some kernels have. Other behaviour differs less between
/// kernels.
const QUICK: [(&str, &[&str]); 8] = [
    ("answers", &["earlier_connection_is_reset", "reply_at_node_egress"]),
    ("bypass", &["calls::tcp_and_udp", "links::ipvlan_in_layer_2", "services::service_with_endpoint"]),
    ("endpoints", &["ipv6_endpoint_is_protected"]),
    ("hooks", &["default_config_has_all_hooks", "socket_hook_denies"]),
    ("from_pod", &["only_pods_are_denied"]),
    ("layouts", &["stacks::vlan_on_bond", "veths::vrf"]),
    ("netkit", &["netkit_raw_frames", "netkit_protocol_of_the_socket", "netkit_redirects_come_second"]),
    ("test_run", &["every_packet_to_endpoint", "verifier_instructions"]),
];

/// Returns the test executables of `--quick`.
pub(super) fn quick_executables() -> Vec<String> {
    QUICK.iter().map(|&(name, _)| name.to_owned()).collect()
}

/// The executable of `cargo xtask faults` and its options: its tests are ignored otherwise, and each needs the machine
/// for itself.
const FAULTS: (&str, &[&str]) = ("faults", &["--include-ignored", "--test-threads=1"]);

/// Executables and environment of one machine.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) agent: PathBuf,
    pub(super) broker: PathBuf,
    pub(super) tests: Vec<Planned>,
    /// Variables in the environment of the tests, as `NAME=VALUE`.
    pub(super) environment: Vec<String>,
    /// The run has a filter, and does not determine the features that the agent uses.
    pub(super) is_brief: bool,
    /// The agent runs with the AppArmor profile of deploy/apparmor.
    pub(super) is_confined: bool,
    /// SELinux policies that the tests load; empty without SELinux.
    pub(super) selinux_policies: Vec<Policy>,
}

/// A test executable with its filter.
#[derive(Debug)]
pub(super) struct Planned {
    pub(super) name: String,
    pub(super) path: PathBuf,
    /// Parts of names of the tests to run. All tests run if this is empty.
    pub(super) filter: Vec<String>,
}

impl Plan {
    /// Selects all tests, those of `filter` (parts of test names, or names of executables), or those of `--quick`.
    pub(super) fn new(
        payload: Payload,
        tools: &Tools,
        filter: &[String],
        is_quick: bool,
        scale: Option<u32>,
    ) -> Result<Self> {
        let is_there = |name: &str| payload.tests.iter().any(|(there, _)| there == name);
        let missing = QUICK.iter().find(|(name, _)| !is_there(name));
        if let Some((name, _)) = missing.filter(|_| filter.is_empty()) {
            bail!("unknown test executable {name} in the selection of --quick");
        }
        // Names of executables are not parts of test names.
        let parts: Vec<_> = filter.iter().filter(|&part| !is_there(part)).cloned().collect();
        let mut tests = Vec::new();
        for (name, path) in payload.tests {
            let is_named = filter.contains(&name);
            let planned = if filter.is_empty() && is_quick {
                Planned { name, path, filter: Vec::new() }.quick(tools)?
            } else if filter.is_empty() || is_named {
                Some(Planned { name, path, filter: Vec::new() })
            } else {
                let is_wanted = !parts.is_empty() && has_tests(tools, &path, &parts)?;
                is_wanted.then(|| Planned { name, path, filter: parts.clone() })
            };
            tests.extend(planned);
        }
        if tests.is_empty() {
            bail!("no test executable and no test matches {0}", filter.join(" or "));
        }
        let usual = if is_quick { QUICK_SCALE_PERCENT } else { SCALE_PERCENT };
        let environment = vec![format!("{SCALE}={}", scale.unwrap_or(usual))];
        let is_brief = !filter.is_empty();
        Ok(Self {
            agent: payload.agent,
            broker: payload.broker,
            tests,
            environment,
            is_brief,
            is_confined: false,
            selinux_policies: Vec::new(),
        })
    }

    /// Returns the names of the test executables.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.tests.iter().map(|planned| planned.name.as_str())
    }
}

impl Planned {
    /// Returns the arguments of the executable.
    pub(super) fn arguments(&self) -> impl Iterator<Item = &str> {
        let options = if self.name == FAULTS.0 { FAULTS.1 } else { &[] };
        options.iter().copied().chain(self.filter.iter().map(String::as_str))
    }

    /// Restricts the executable to its tests of `--quick`. Returns `None` if it has none.
    fn quick(self, tools: &Tools) -> Result<Option<Self>> {
        let Some((name, parts)) = QUICK.iter().find(|(name, _)| *name == self.name) else { return Ok(None) };
        for part in *parts {
            if !has_tests(tools, &self.path, &[(*part).to_owned()])? {
                bail!("{name} has no test {part}, which --quick selects");
            }
        }
        Ok(Some(Self { filter: parts.iter().map(|&part| part.to_owned()).collect(), ..self }))
    }
}

/// Reports whether an executable has tests with these names, by running it on this machine.
fn has_tests(tools: &Tools, executable: &Path, filter: &[String]) -> Result<bool> {
    let mut list = tools.emulated(executable)?;
    let output = list.args(["--list", "--format", "terse"]).args(filter).output();
    let output = output.with_context(|| format!("failed to start {}", executable.display()))?;
    Ok(String::from_utf8_lossy(&output.stdout).lines().any(|line| line.ends_with(": test")))
}
