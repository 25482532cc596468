//! Which tests run, and how much of each.

use std::{
    num::NonZero,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use imds_tests::EFFORT;

use super::build::Payload;
use crate::build::commit;

/// How many times less of the longest tests is done than on a machine that is not emulated.
const DIVISOR: u32 = 4;
/// The same with `--quick`.
const QUICK_DIVISOR: u32 = 20;
/// The tests of `--quick`, by executable and parts of their names; all of an executable's where there are none. Each
/// hook alone and all of them, every program before the kernel's verifier, answers, IPv6, and devices that only some
/// kernels have: what else there is differs less from kernel to kernel.
const QUICK: [(&str, &[&str]); 7] = [
    ("answers", &["earlier_connection_is_reset", "reply_at_node_egress"]),
    ("bypass", &["calls::tcp_and_udp", "links::ipvlan_in_layer_2", "services::service_with_endpoint"]),
    ("endpoints", &["ipv6_endpoint_is_protected"]),
    ("hooks", &["default_config_has_all_hooks", "socket_hook_denies"]),
    ("from_pod", &["only_pods_are_denied"]),
    ("layouts", &["stacks::vlan_on_bond", "veths::vrf"]),
    ("test_run", &["every_packet_to_endpoint", "verifier_instructions"]),
];

/// What tests are ignored but here, each of which takes the machine for itself: those of `cargo xtask faults`.
const FAULTS: (&str, &[&str]) = ("faults", &["--include-ignored", "--test-threads=1"]);

/// What a machine is to do.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) agent: PathBuf,
    pub(super) tests: Vec<Planned>,
    /// What the agent and the tests were built from.
    pub(super) commit: String,
    /// Variables of the tests' environment, as `NAME=VALUE`.
    pub(super) environment: Vec<String>,
    /// Whether it is about a few tests, and not about what the agent makes use of on each kernel.
    pub(super) is_brief: bool,
    /// Whether it is all tests, and as much of each as there is time for.
    pub(super) is_whole: bool,
}

/// A test executable.
#[derive(Debug)]
pub(super) struct Planned {
    pub(super) name: String,
    pub(super) path: PathBuf,
    /// Parts of names of those of its tests that are to run; all, where there are none.
    pub(super) filter: Vec<String>,
}

impl Plan {
    /// All tests, those of `filter` (parts of tests' names, or names of executables), or `is_quick` ones.
    pub(super) fn new(
        payload: Payload,
        filter: &[String],
        is_quick: bool,
        divisor: Option<NonZero<u32>>,
    ) -> Result<Self> {
        let is_there = |name: &str| payload.tests.iter().any(|(there, _)| there == name);
        let missing = QUICK.iter().find(|(name, _)| !is_there(name));
        if let Some((name, _)) = missing.filter(|_| filter.is_empty()) {
            bail!("there is no test executable {name} any more, of which the quick tests are to be");
        }
        // What names an executable is no part of a test's name.
        let parts: Vec<_> = filter.iter().filter(|&part| !is_there(part)).cloned().collect();
        let mut tests = Vec::new();
        for (name, path) in payload.tests {
            let is_named = filter.contains(&name);
            let planned = if filter.is_empty() && is_quick {
                Planned { name, path, filter: Vec::new() }.quick()?
            } else if filter.is_empty() || is_named {
                Some(Planned { name, path, filter: Vec::new() })
            } else {
                let is_wanted = !parts.is_empty() && has_tests(&path, &parts)?;
                is_wanted.then(|| Planned { name, path, filter: parts.clone() })
            };
            tests.extend(planned);
        }
        if tests.is_empty() {
            bail!("no test executable is called {0}, and no test has it in its name", filter.join(" or "));
        }
        let usual = if is_quick { QUICK_DIVISOR } else { DIVISOR };
        let divisor = divisor.map_or(usual, NonZero::get);
        let environment = vec![format!("{EFFORT}={divisor}")];
        let is_brief = !filter.is_empty();
        let is_whole = !is_brief && !is_quick;
        Ok(Self { agent: payload.agent, tests, commit: commit(), environment, is_brief, is_whole })
    }

    /// The test executables' names.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.tests.iter().map(|planned| planned.name.as_str())
    }
}

impl Planned {
    /// What it is started with.
    pub(super) fn arguments(&self) -> impl Iterator<Item = &str> {
        let options = if self.name == FAULTS.0 { FAULTS.1 } else { &[] };
        options.iter().copied().chain(self.filter.iter().map(String::as_str))
    }

    /// What of it is quick, if anything is.
    fn quick(self) -> Result<Option<Self>> {
        let Some((name, parts)) = QUICK.iter().find(|(name, _)| *name == self.name) else { return Ok(None) };
        for part in *parts {
            if !has_tests(&self.path, &[(*part).to_owned()])? {
                bail!("{name} has no test {part} any more, which is to be among the quick ones");
            }
        }
        Ok(Some(Self { filter: parts.iter().map(|&part| part.to_owned()).collect(), ..self }))
    }
}

/// Whether an executable has tests of these names: it runs here, too.
fn has_tests(executable: &Path, filter: &[String]) -> Result<bool> {
    let mut list = Command::new(executable);
    let output = list.args(["--list", "--format", "terse"]).args(filter).output();
    let output = output.with_context(|| format!("could not start {}", executable.display()))?;
    Ok(String::from_utf8_lossy(&output.stdout).lines().any(|line| line.ends_with(": test")))
}
