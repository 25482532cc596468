//! Which tests run, and how much of each.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use imds_tests::EFFORT;

use super::build::Payload;

/// How many times less of the longest tests is done with `--quick`.
const DIVISOR: u32 = 20;
/// The tests of `--quick`, by executable and parts of their names; all of an executable's where there are none. Each
/// hook, each way of attaching and each fallback for want of something in an older kernel is in one of them.
const QUICK: [(&str, &[&str]); 12] = [
    ("answers", &["connections_are_refused"]),
    (
        "bypass",
        &[
            "calls::tcp_and_udp",
            "crafted::every_kind",
            "links::ipvlan_in_layer_2",
            "links::netkit_in_layer_3",
            "services::a_service_whose_backend",
            "together::",
            "tunnels::vxlan_with_ipv6",
        ],
    ),
    ("coexist", &["a_bpf_filter_that_accepts_all", "tcx_comes_before", "programs_of_others_at_the_pod_edge"]),
    ("differential", &[]),
    ("endpoints", &["an_ipv6_endpoint", "kept_ports"]),
    ("events", &["a_call_is_told", "a_packet_is_told"]),
    ("hooks", &["all_hooks_together", "the_socket_hook_refuses"]),
    ("pod_edge", &["a_connection_that_was_open", "pods_are_blocked"]),
    ("refusals", &["a_limit_of_locked_memory", "three_capabilities"]),
    ("restart", &["flood_passes_while_tcx", "flood_passes_while_clsact"]),
    ("test_run", &[]),
    ("unload", &["nothing_is_left"]),
];

/// What a machine is to do.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) agent: PathBuf,
    pub(super) tests: Vec<Planned>,
    /// Variables of the tests' environment, as `NAME=VALUE`.
    pub(super) environment: Vec<String>,
    /// Whether it is about a few tests, and not about what the agent makes use of on each kernel.
    pub(super) is_brief: bool,
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
    /// All tests, those of `filter`, or `is_quick` ones.
    pub(super) fn new(payload: Payload, filter: &[String], is_quick: bool) -> Result<Self> {
        let is_there = |name| payload.tests.iter().any(|(there, _)| there == name);
        if let Some((name, _)) = QUICK.iter().find(|(name, _)| !is_there(*name)) {
            bail!("there is no test executable {name} any more, of which the quick tests are to be");
        }
        let mut tests = Vec::new();
        for (name, path) in payload.tests {
            let planned = Planned { name, path, filter: filter.to_vec() };
            let planned = if is_quick && filter.is_empty() { planned.quick()? } else { Some(planned) };
            if let Some(planned) = planned
                && (filter.is_empty() || has_tests(&planned.path, filter)?)
            {
                tests.push(planned);
            }
        }
        if tests.is_empty() {
            bail!("no test has {} in its name", filter.join(" or "));
        }
        let environment = is_quick.then(|| format!("{EFFORT}={DIVISOR}")).into_iter().collect();
        Ok(Self { agent: payload.agent, tests, environment, is_brief: !filter.is_empty() })
    }

    /// The test executables' names.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.tests.iter().map(|planned| planned.name.as_str())
    }
}

impl Planned {
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
