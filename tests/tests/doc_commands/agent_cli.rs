//! Documented command lines of imds-agent, checked with its argument parser.

use std::collections::BTreeSet;

use clap::{Arg, Command, CommandFactory as _, error::ErrorKind};
use imds_agent::cli::Cli;

/// Reports whether `word` is a subcommand of imds-agent.
pub(crate) fn is_subcommand(word: &str) -> bool {
    Cli::command().find_subcommand(word).is_some()
}

/// Result of parsing a command line.
#[derive(Debug, Eq, PartialEq)]
pub(crate) enum Parsed {
    Complete,
    /// A mention without a required value, such as `run --cgroup` in a sentence.
    Incomplete,
}

/// Parses a command line whose first word is the program. Placeholders stand for values.
pub(crate) fn parse(words: &[String]) -> Result<Parsed, String> {
    parse_with(&Cli::command(), words)
}

/// Parses a command line with the parser of a program.
pub(crate) fn parse_with(commands: &Command, words: &[String]) -> Result<Parsed, String> {
    let names: Vec<_> = if words.iter().any(|word| word == "COMMAND") {
        commands.get_subcommands().map(Command::get_name).collect()
    } else {
        vec![""]
    };
    let is_cut = words.iter().any(|word| word == "…");
    let mut parsed = Parsed::Complete;
    for name in names {
        let words = words.iter().map(String::as_str).filter(|&word| word != "…");
        let words = words.map(|word| if word == "COMMAND" { name } else { sample(word) });
        match commands.clone().try_get_matches_from(words) {
            Ok(_) => {}
            Err(error) => match error.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {}
                ErrorKind::MissingRequiredArgument
                | ErrorKind::MissingSubcommand
                | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => parsed = Parsed::Incomplete,
                ErrorKind::InvalidValue if error.to_string().contains("a value is required") => {
                    parsed = Parsed::Incomplete;
                }
                _ => return Err(error.to_string()),
            },
        }
    }
    Ok(if is_cut { Parsed::Incomplete } else { parsed })
}

/// Returns a valid value for a placeholder.
fn sample(word: &str) -> &str {
    match word {
        "ADDRESS" => "127.0.0.1:9254",
        "DIR" | "FILE" => "/example",
        "DURATION" => "10m",
        "FORMAT" => "text",
        "KEY" => "example.com/key",
        "LEVEL" => "info",
        "SECONDS" => "1",
        "SHELL" => "bash",
        _ => word,
    }
}

/// Reports whether a subcommand of imds-agent has this option.
pub(crate) fn has_option(option: &str) -> bool {
    has_option_in(&Cli::command(), option)
}

/// Reports whether a subcommand of a program has this option.
pub(crate) fn has_option_in(program: &Command, option: &str) -> bool {
    let (commands, mut found) = (leaves_of(program.clone()), false);
    for (_, command) in commands {
        found |= command.get_arguments().any(|argument| is_named(argument, option));
    }
    found || ["--help", "--version"].contains(&option)
}

fn is_named(argument: &Arg, option: &str) -> bool {
    let long = argument.get_long().is_some_and(|long| option.strip_prefix("--") == Some(long));
    long || argument.get_short().is_some_and(|short| option == format!("-{short}"))
}

/// Returns each command without subcommands, with its name and those above it.
pub(crate) fn leaves_of(mut command: Command) -> Vec<(String, Command)> {
    command.build();
    let mut leaves = Vec::new();
    for outer in command.get_subcommands().filter(|outer| outer.get_name() != "help") {
        let inner: Vec<_> = outer.get_subcommands().filter(|inner| inner.get_name() != "help").collect();
        leaves.extend(
            inner
                .iter()
                .map(|inner| (format!("{} {}", outer.get_name(), inner.get_name()), (*inner).clone())),
        );
        if inner.is_empty() {
            leaves.push((outer.get_name().to_owned(), outer.clone()));
        }
    }
    leaves
}

/// Compares the usage lines of a document with the parser, in both directions. Global and hidden options are left out.
pub(crate) fn synopsis_errors(lines: &[String]) -> Vec<String> {
    compare_usages("imds-agent", &leaves_of(Cli::command()), lines)
}

/// Compares usage lines with the commands of a program.
pub(crate) fn compare_usages(program: &str, leaves: &[(String, Command)], lines: &[String]) -> Vec<String> {
    let mut usages = Vec::<String>::new();
    for line in lines {
        match usages.last_mut().filter(|_| line.starts_with(' ')) {
            Some(usage) => usage.extend([" ", line.trim()]),
            None => usages.push(line.trim().to_owned()),
        }
    }
    let documented: BTreeSet<_> = usages.into_iter().collect();
    let expected: BTreeSet<_> = leaves.iter().map(|(name, command)| usage(program, name, command)).collect();
    let sorted = |usage: &String| {
        let mut parts: Vec<_> = usage.split(" [").map(str::to_owned).collect();
        parts[1..].sort();
        parts
    };
    let [documented, expected] =
        [documented, expected].map(|usages| usages.iter().map(sorted).collect::<Vec<_>>());
    let missing = expected.iter().filter(|usage| !documented.contains(usage));
    let unknown = documented.iter().filter(|usage| !expected.contains(usage));
    let missing = missing.map(|usage| format!("missing in the document: {}", usage.join(" [")));
    missing.chain(unknown.map(|usage| format!("unlike the parser: {}", usage.join(" [")))).collect()
}

fn usage(program: &str, name: &str, command: &Command) -> String {
    let mut usage = format!("{program} {name}");
    for argument in command.get_arguments() {
        let is_general =
            argument.is_global_set() || ["help", "version"].contains(&argument.get_id().as_str());
        if is_general || argument.is_hide_set() {
            continue;
        }
        let values: Vec<_> =
            argument.get_possible_values().iter().map(|value| value.get_name().to_owned()).collect();
        let takes_value = argument.get_action().takes_values();
        let value = match argument.get_value_names() {
            _ if !takes_value => String::new(),
            _ if values.len() > 1 && !argument.is_positional() => values.join("|"),
            Some(names) => names.join(" "),
            None => String::new(),
        };
        let value = value.as_str();
        let text = match (argument.get_short(), argument.get_long()) {
            (Some(short), _) => format!("-{short} {value}"),
            (None, Some(long)) => format!("--{long} {value}"),
            (None, None) => value.to_owned(),
        };
        let repeats = if matches!(argument.get_action(), clap::ArgAction::Append) && !argument.is_positional()
        {
            "..."
        } else {
            ""
        };
        if argument.is_required_set() {
            usage.extend([" ", text.trim()]);
        } else {
            usage.extend([" [", text.trim(), "]", repeats]);
        }
    }
    usage
}

#[test]
fn wrong_options_are_found() {
    let parse_text = |text: &str| parse(&text.split(' ').map(str::to_owned).collect::<Vec<_>>());
    assert_eq!(parse_text("imds-agent run --config FILE"), Ok(Parsed::Complete));
    assert_eq!(parse_text("imds-agent COMMAND --help"), Ok(Parsed::Complete));
    assert_eq!(parse_text("imds-agent run --config"), Ok(Parsed::Incomplete));
    assert_eq!(parse_text("/imds-agent …"), Ok(Parsed::Incomplete));
    for wrong in [
        "imds-agent status --json",
        "imds-agent report -o yaml",
        "imds-agent state",
        "imds-agent run --resync 0",
    ] {
        assert!(parse_text(wrong).is_err(), "{wrong}");
    }
    let [line] = ["imds-agent status [-o table|yaml]".to_owned()];
    assert!(
        synopsis_errors(&[line])
            .iter()
            .any(|error| error.starts_with("unlike the parser: imds-agent status"))
    );
}
