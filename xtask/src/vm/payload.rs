//! Builds of the agent and the tests. They are linked statically, because the virtual machines have no libraries.

use std::{path::PathBuf, process::Stdio};

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;

use crate::workspace::{artifacts, cargo, describe, print_status, root};

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Executables for the virtual machines.
#[derive(Debug)]
pub(super) struct Payload {
    pub(super) agent: PathBuf,
    /// Name and path of each test executable.
    pub(super) tests: Vec<(String, PathBuf)>,
}

impl Payload {
    /// Compiles the agent and the test executables that `filter` names. Compiles all of them if the filter contains
    /// parts of test names.
    pub(super) fn build(filter: &[String]) -> Result<Self> {
        let mut build = cargo("build");
        let are_all_executables = !filter.is_empty() && filter.iter().all(|name| is_executable(name));
        let tests = if are_all_executables { filter } else { &["*".to_owned()] };
        build
            .args([
                "--locked",
                "--profile",
                "vm",
                "--target",
                TARGET,
                "--message-format",
                "json-render-diagnostics",
            ])
            .args(["--package", "imds-agent", "--bin", "imds-agent", "--package", "imds-tests"])
            .args(tests.iter().flat_map(|test| ["--test", test]))
            .arg("--target-dir")
            .arg(artifacts("vm")?)
            .env("RUSTFLAGS", "-Ctarget-feature=+crt-static")
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .stderr(Stdio::inherit());
        let what = describe(&build);
        print_status(&what);
        let output = build.output().with_context(|| format!("failed to start {what}"))?;
        if !output.status.success() {
            bail!("{what} failed ({})", output.status);
        }
        Self::from_messages(&String::from_utf8_lossy(&output.stdout))
            .with_context(|| format!("{what} built no agent"))
    }

    fn from_messages(messages: &str) -> Option<Self> {
        let (mut agent, mut tests) = (None, Vec::new());
        for message in messages.lines().filter_map(|line| serde_json::from_str::<Message>(line).ok()) {
            let Message { target, executable: Some(executable) } = message else { continue };
            if target.kind == ["test"] {
                tests.push((target.name, executable));
            } else {
                agent = Some(executable);
            }
        }
        tests.sort();
        Some(Self { agent: agent?, tests })
    }
}

/// Reports whether a test executable of that name is compiled from a file or a directory of the package.
fn is_executable(name: &str) -> bool {
    let tests = root().join("tests/tests");
    let is_plain = name.chars().all(|char| char.is_ascii_alphanumeric() || char == '_');
    is_plain && (tests.join(name).join("main.rs").is_file() || tests.join(format!("{name}.rs")).is_file())
}

/// A JSON message of cargo about a compiled target.
#[derive(Deserialize)]
struct Message {
    target: Target,
    executable: Option<PathBuf>,
}

#[derive(Deserialize)]
struct Target {
    kind: Vec<String>,
    name: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn executables_are_files_or_directories() {
        assert!(is_executable("unload") && is_executable("layouts"));
        assert!(!is_executable("bypass/main") && !is_executable("vlan") && !is_executable(""));
    }

    #[test]
    fn executables_are_classified_by_kind() {
        let messages = r#"{"reason":"compiler-artifact","target":{"kind":["lib"],"name":"imds_agent"},"executable":null}
{"reason":"compiler-artifact","target":{"kind":["test"],"name":"unload"},"executable":"/t/unload-1"}
{"reason":"compiler-artifact","target":{"kind":["bin"],"name":"imds-agent"},"executable":"/t/imds-agent"}
{"reason":"compiler-artifact","target":{"kind":["test"],"name":"follow"},"executable":"/t/follow-1"}
{"reason":"build-finished","success":true}"#;
        let payload = Payload::from_messages(messages).unwrap();
        let names: Vec<_> = payload.tests.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["follow", "unload"]);
        assert_eq!(payload.agent, PathBuf::from("/t/imds-agent"));
        assert!(Payload::from_messages("").is_none());
    }
}
