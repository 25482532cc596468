//! Documented command lines of `kubectl imds`, checked with the argument parser of the plugin.

use clap::{Command, CommandFactory as _};
use kubectl_imds::cli::Cli;

use crate::{
    agent_cli::{Parsed, compare_usages, has_option_in, leaves_of, parse_with},
    artifacts, tools,
};

/// Words before the arguments of the plugin.
pub(crate) const PROGRAM: &str = "kubectl imds";
const MANIFEST: &str = "deploy/krew/imds.yaml";
const RBAC: &str = "deploy/krew/rbac.yaml";

/// Checks the words after `kubectl`, of which the first is `imds`.
pub(crate) fn check(words: &[String]) -> Result<Parsed, String> {
    parse_with(&Cli::command(), words)
}

/// Checks the words after `kubectl krew`.
pub(crate) fn check_krew(words: &[String]) -> Result<(), String> {
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    let ["install", "--manifest", manifest, "--archive", archive] = words[..] else {
        return Err("unknown arguments of krew".to_owned());
    };
    tools::ensure(MANIFEST.ends_with(&format!("/{manifest}")), || format!("{manifest} is not {MANIFEST}"))?;
    artifacts::check_name(archive)
}

/// Checks that a document quotes the file with the permissions.
pub(crate) fn check_permissions(text: &str) -> Result<(), String> {
    let file = tools::read(RBAC);
    let rules: Vec<_> = file.lines().map(|line| line.strip_prefix("  ").unwrap_or(line)).collect();
    tools::ensure(rules.join("\n").contains(text), || format!("{RBAC} has other rules"))
}

/// Compares the titles of a table with those in the source of `status`.
pub(crate) fn check_titles(table: &str) -> Result<(), String> {
    let source = tools::read("kubectl-imds/src/commands/status.rs");
    let titles = table.lines().next().unwrap_or_default().split_whitespace();
    let titles: Vec<_> = titles.map(|title| format!("\"{title}\"")).collect();
    tools::ensure(source.contains(&titles.join(", ")), || format!("the titles are not {titles:?}"))
}

/// Reports whether a subcommand of the plugin has this option.
pub(crate) fn has_option(option: &str) -> bool {
    has_option_in(&Cli::command(), option)
}

/// Compares the usage lines of a document with the parser, in both directions.
pub(crate) fn synopsis_errors(lines: &[String]) -> Vec<String> {
    compare_usages(PROGRAM, &leaves_of(Cli::command()), lines)
}

#[test]
fn wrong_options_are_found() {
    let check = |text: &str| check(&text.split(' ').map(str::to_owned).collect::<Vec<_>>());
    assert_eq!(check("imds status -o json"), Ok(Parsed::Complete));
    assert_eq!(check("imds COMMAND --help"), Ok(Parsed::Complete));
    assert_eq!(check("imds rollout status"), Ok(Parsed::Complete));
    for wrong in ["imds status --json", "imds state", "imds rollout history"] {
        assert!(check(wrong).is_err(), "{wrong}");
    }
    let command: Command = Cli::command();
    assert!(command.find_subcommand("status").is_some());
}
