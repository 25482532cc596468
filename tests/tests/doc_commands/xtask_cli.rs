//! Documented cargo commands, checked with the help of xtask and the names of tests.

use std::{env, fs, path::Path, process::Command, sync::OnceLock};

use crate::markdown::repository;

/// Commands of xtask that take names of tests.
const WITH_TESTS: [&str; 4] = ["e2e", "faults", "test", "vm"];

/// Checks the arguments of cargo.
pub(crate) fn check_cargo(arguments: &[String]) -> Result<(), String> {
    let arguments: Vec<_> = arguments.iter().map(|word| word.trim_matches(['[', ']'])).collect();
    match &arguments[..] {
        ["xtask"] | ["build" | "install" | "tree", ..] | ["nextest", "run", ..] => Ok(()),
        ["xtask", subcommand, rest @ ..] => check_xtask(subcommand, rest),
        ["test", rest @ ..] => check_test(rest),
        _ => Err("unknown command of cargo".to_owned()),
    }
}

/// Reports whether a command of xtask has this option.
pub(crate) fn has_option(option: &str) -> bool {
    helps().iter().any(|(_, help)| has_word(help, option))
}

fn check_xtask(subcommand: &str, arguments: &[&str]) -> Result<(), String> {
    let found = helps().iter().find(|(name, _)| name == subcommand);
    let (_, help) = found.ok_or_else(|| format!("xtask has no command {subcommand}"))?;
    let (mut is_value, mut is_filter) = (false, false);
    for &word in arguments {
        let is_right = match word {
            _ if is_value || is_placeholder(word) => true,
            "--" => {
                is_filter = true;
                true
            }
            _ if word.starts_with('-') && !is_filter => has_word(help, word),
            _ if WITH_TESTS.contains(&subcommand) => has_word(help, word) || is_test(word),
            _ => has_word(help, word),
        };
        if !is_right {
            return Err(format!("cargo xtask {subcommand} knows no {word}"));
        }
        is_value = word.starts_with("--") && help.contains(&format!("{word} <"));
    }
    Ok(())
}

fn check_test(arguments: &[&str]) -> Result<(), String> {
    let own = arguments.iter().position(|&word| word == "--").unwrap_or(arguments.len());
    let mut words = arguments[..own].iter();
    while let Some(&word) = words.next() {
        match word {
            "-p" if words.next() == Some(&"imds-tests") => {}
            "--test" => {
                let name = words.next().copied().unwrap_or_default();
                if !is_placeholder(name) && !is_executable(name) {
                    return Err(format!("there is no test executable {name}"));
                }
            }
            "--locked" => {}
            _ => return Err(format!("unknown argument {word}")),
        }
    }
    let filters = arguments.iter().skip(own + 1).filter(|word| !word.starts_with("--"));
    let unknown: Vec<_> = filters.filter(|name| !is_test(name)).collect();
    if unknown.is_empty() { Ok(()) } else { Err(format!("there is no test {unknown:?}")) }
}

fn is_placeholder(word: &str) -> bool {
    word.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'_')
}

/// Reports whether `help` contains a whole word.
fn has_word(help: &str, word: &str) -> bool {
    let is_part = |char: char| char.is_alphanumeric() || char == '-' || char == '_';
    help.match_indices(word).any(|(start, _)| {
        !help[..start].ends_with(is_part) && !help[start + word.len()..].starts_with(is_part)
    })
}

/// Returns the commands of xtask with their help texts. Panics if xtask is not built.
pub(crate) fn helps() -> &'static [(String, String)] {
    static HELPS: OnceLock<Vec<(String, String)>> = OnceLock::new();
    HELPS.get_or_init(|| {
        let executable = env::current_exe().expect("path of this executable");
        let mut built = executable.ancestors().skip(1).map(|directory| directory.join("xtask"));
        let xtask = built.find(|path| path.is_file()).expect("xtask, which `cargo build --workspace` builds");
        let help = |arguments: &[&str]| {
            let output = Command::new(&xtask).args(arguments).output().expect("run xtask");
            assert!(output.status.success(), "{arguments:?}: {output:?}");
            String::from_utf8(output.stdout).expect("text")
        };
        let all = help(&["--help"]);
        let lines =
            all.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
        let names = lines.filter_map(|line| line.strip_prefix("  ")?.split(' ').next());
        let names = names.filter(|name| !["", "help"].contains(name));
        names.map(|name| (name.to_owned(), help(&[name, "--help"]))).collect()
    })
}

fn is_executable(name: &str) -> bool {
    let tests = repository().join("tests/tests");
    tests.join(name).join("main.rs").exists() || tests.join(name).with_extension("rs").exists()
}

/// Reports whether `name` is a test executable, or part of the name of a test.
fn is_test(name: &str) -> bool {
    let part = name.rsplit("::").next().unwrap_or_default();
    is_executable(name) || has_function(&repository().join("tests/tests"), part)
}

fn has_function(directory: &Path, part: &str) -> bool {
    fs::read_dir(directory).expect("read a directory").any(|entry| {
        let path = entry.expect("read a directory").path();
        if path.is_dir() {
            return has_function(&path, part);
        }
        let text = fs::read_to_string(&path).unwrap_or_default();
        let functions = text.lines().filter_map(|line| line.trim().strip_prefix("fn ")?.split('(').next());
        functions.into_iter().any(|name| name.contains(part))
    })
}

#[test]
fn every_command_of_xtask_is_documented() {
    if crate::lacks_repository() {
        return;
    }
    let text = fs::read_to_string(repository().join("CONTRIBUTING.md")).expect("CONTRIBUTING.md");
    let missing: Vec<_> = helps()
        .iter()
        .map(|(name, _)| name)
        .filter(|name| !text.contains(&format!("cargo xtask {name}")))
        .collect();
    assert!(helps().len() > 10 && missing.is_empty(), "CONTRIBUTING.md lacks {missing:?}");
}
