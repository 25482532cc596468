//! Builds of the agent and the tests for the virtual machines.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};
use cargo_metadata::{Artifact, Message};

use crate::{
    arch::Arch,
    test,
    workspace::{artifacts, cargo, describe, execute, print_status, root},
};

/// Executables for the virtual machines.
#[derive(Debug)]
pub(super) struct Payload {
    pub(super) agent: PathBuf,
    pub(super) broker: PathBuf,
    /// Name and path of each test executable.
    pub(super) tests: Vec<(String, PathBuf)>,
}

impl Payload {
    /// Compiles the agent and the test executables that `filter` names, optimized: emulated machines are slow. Compiles all
    /// of them if the filter contains parts of test names.
    pub(super) fn build(arch: Arch, filter: &[String]) -> Result<Self> {
        let mut build = cargo("build");
        let are_all_executables = !filter.is_empty() && filter.iter().all(|name| is_executable(name));
        let tests = if are_all_executables { filter } else { &["*".to_owned()] };
        build
            .args(["--locked", "--profile", "vm"])
            .args([
                "--package",
                "imds-agent",
                "--bin",
                "imds-agent",
                "--package",
                "imds-broker",
                "--bin",
                "imds-broker",
            ])
            .args(["--package", "imds-tests"])
            .args(tests.iter().flat_map(|test| ["--test", test]))
            .arg("--target-dir")
            .arg(artifacts("vm")?)
            .env("RUSTFLAGS", "-Ctarget-feature=+crt-static")
            .env_remove("CARGO_ENCODED_RUSTFLAGS");
        arch.set_target(&mut build)?;
        Self::from_build(&mut build)
    }

    /// Returns the agent and the named test executables of `cargo xtask test`, without debug information. If that command
    /// ran before on a machine of this architecture, nothing is compiled.
    pub(super) fn of_debug_build(arch: Arch, names: &[String]) -> Result<Self> {
        let mut build = test::build_command();
        if arch.is_foreign() {
            // The emulator of single programs, which lists the tests, has no libraries.
            build.env("RUSTFLAGS", "-Ctarget-feature=+crt-static").env_remove("CARGO_ENCODED_RUSTFLAGS");
            arch.set_target(&mut build)?;
        }
        let mut payload = Self::from_build(&mut build)?;
        payload.tests.retain(|(name, _)| names.contains(name));
        let dir = artifacts("vm")?.join("debug").join(arch.debian());
        fs::create_dir_all(&dir).with_context(|| format!("failed to create {}", dir.display()))?;
        payload.agent = stripped(arch, &payload.agent, dir.join("imds-agent"))?;
        payload.broker = stripped(arch, &payload.broker, dir.join("imds-broker"))?;
        for (name, path) in &mut payload.tests {
            *path = stripped(arch, path, dir.join(name))?;
        }
        Ok(payload)
    }

    /// Runs a `cargo build` and returns the executables that it reports.
    fn from_build(build: &mut Command) -> Result<Self> {
        build.args(["--message-format", "json-render-diagnostics"]).stderr(Stdio::inherit());
        let command = describe(build);
        print_status(&command);
        let output = build.output().with_context(|| format!("failed to start {command}"))?;
        if !output.status.success() {
            bail!("{command} failed ({})", output.status);
        }
        Self::from_messages(&String::from_utf8_lossy(&output.stdout))
            .with_context(|| format!("{command} built no agent or no broker"))
    }

    fn from_messages(messages: &str) -> Option<Self> {
        let (mut agent, mut broker, mut tests) = (None, None, Vec::new());
        for message in Message::parse_stream(messages.as_bytes()).flatten() {
            let Message::CompilerArtifact(Artifact { target, executable: Some(executable), profile, .. }) =
                message
            else {
                continue;
            };
            if target.is_test() {
                tests.push((target.name, executable.into()));
            } else if target.name == "imds-agent" && !profile.test {
                agent = Some(executable.into());
            } else if target.name == "imds-broker" && !profile.test {
                broker = Some(executable.into());
            }
        }
        tests.sort();
        Some(Self { agent: agent?, broker: broker?, tests })
    }
}

/// Writes a copy of an executable without debug information to `to`, and returns that path. The debug information of all
/// executables would not fit into the memory of a virtual machine.
fn stripped(arch: Arch, executable: &Path, to: PathBuf) -> Result<PathBuf> {
    execute(
        Command::new(arch.toolchain_program("strip")).arg("--strip-debug").arg("-o").arg(&to).arg(executable),
    )?;
    Ok(to)
}

/// Reports whether a test executable of that name is compiled from a file or a directory of the package.
fn is_executable(name: &str) -> bool {
    let tests = root().join("tests/tests");
    let is_plain = name.chars().all(|char| char.is_ascii_alphanumeric() || char == '_');
    is_plain && (tests.join(name).join("main.rs").is_file() || tests.join(format!("{name}.rs")).is_file())
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
        let artifact = |kind, name, test, executable| {
            let target = format!(
                r#""target":{{"kind":["{kind}"],"name":"{name}","crate_types":["{kind}"],"src_path":"/s.rs"}}"#
            );
            let profile = format!(
                r#""profile":{{"opt_level":"0","debug_assertions":true,"overflow_checks":true,"test":{test}}}"#
            );
            format!(
                r#"{{"reason":"compiler-artifact","package_id":"p",{target},{profile},"features":[],"filenames":[],"executable":{executable},"fresh":true}}"#
            )
        };
        let messages = [
            artifact("lib", "imds_agent", false, "null"),
            artifact("lib", "imds_agent", true, r#""/t/imds_agent-1""#),
            artifact("test", "unload", true, r#""/t/unload-1""#),
            artifact("bin", "imds-agent", false, r#""/t/imds-agent""#),
            artifact("bin", "imds-agent", true, r#""/t/imds-agent-1""#),
            artifact("bin", "imds-broker", false, r#""/t/imds-broker""#),
            artifact("bin", "imds-broker", true, r#""/t/imds-broker-1""#),
            artifact("bin", "xtask", false, r#""/t/xtask""#),
            artifact("test", "follow", true, r#""/t/follow-1""#),
            r#"{"reason":"build-finished","success":true}"#.to_owned(),
        ];
        let messages = &messages.join("\n");
        let payload = Payload::from_messages(messages).unwrap();
        let names: Vec<_> = payload.tests.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["follow", "unload"]);
        assert_eq!(payload.agent, PathBuf::from("/t/imds-agent"));
        assert_eq!(payload.broker, PathBuf::from("/t/imds-broker"));
        assert!(Payload::from_messages("").is_none());
    }
}
