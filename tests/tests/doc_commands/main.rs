//! Commands, data and links of the documentation: commands run in the state in which they are documented, or are checked
//! against the programs and files that they name. A command or block of no known kind fails, so that each needs a decision.

mod agent_cli;
mod artifacts;
mod commands;
mod documented_node;
mod links;
mod maps;
mod markdown;
mod plugin_cli;
mod runs;
mod shown_output;
mod states;
mod tools;
mod xtask_cli;

use std::{collections::BTreeSet, fs};

use imds_tests::{TestEnv, WHOLE_TEST, promql::names_in, skip};

use agent_cli::Parsed;
use commands::{Content, Documented, commands_in_text, content, documents, simple_commands};
use markdown::{Block, Document, repository};
use runs::{ONLY_PARSED, RUNS};

/// Sections of docs/commands.md whose blocks are output that the test of the states compares.
///
/// The tests of events and scoped exemptions look for lines like those of requests.
const OUTPUT: [&str; 11] = [
    "status",
    "events",
    "Events of requests",
    "Requests of exempt and audited pods",
    "report",
    "Reported requests",
    "verify",
    "doctor",
    "Firewall rules",
    "config",
    "Log",
];

/// Reports whether the documents are missing, and prints a skip notice then. Test machines of other kernels have no files.
fn lacks_repository() -> bool {
    let is_missing = !repository().join("docs").exists();
    if is_missing {
        skip(WHOLE_TEST, "there is no repository on this machine");
    }
    is_missing
}

/// Returns all commands of the documents.
fn every_command() -> Vec<Documented> {
    let mut found = Vec::new();
    for document in documents() {
        for block in &document.blocks {
            if let Content::Commands(commands) = content(block).unwrap_or_else(|error| panic!("{error}")) {
                found.extend(commands);
            }
        }
        found.extend(commands_in_text(&document));
    }
    found
}

/// Checks one command without running it.
fn check(command: &Documented) -> Result<(), String> {
    let is_run = RUNS.iter().any(|run| run.text == command.text);
    // The test `maps` runs all commands in the blocks of this document.
    if command.at.starts_with("docs/maps.md") && !command.is_span {
        return Ok(());
    }
    for words in simple_commands(&command.text) {
        let is_ours = words.first().is_some_and(|program| program == "imds-agent");
        if is_ours || !is_run {
            tools::check(&words)?;
        }
        let text = words.join(" ");
        let runs_alone =
            || RUNS.iter().any(|run| run.text == text) || ONLY_PARSED.iter().any(|(only, _)| *only == text);
        if is_ours && !is_run && !runs_alone() && agent_cli::parse(&words) == Ok(Parsed::Complete) {
            return Err("no state of a node is listed in which it runs".to_owned());
        }
    }
    Ok(())
}

#[test]
fn every_command_is_checked() {
    if lacks_repository() {
        return;
    }
    let commands = every_command();
    let failures: Vec<_> = commands
        .iter()
        .filter_map(|command| Some(format!("{}: `{}`: {}", command.at, command.text, check(command).err()?)))
        .collect();
    assert!(commands.len() > 150, "{} commands", commands.len());
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    let texts: BTreeSet<_> = commands
        .iter()
        .flat_map(|command| {
            let simple = simple_commands(&command.text).into_iter().map(|words| words.join(" "));
            simple.chain([command.text.clone()])
        })
        .collect();
    let listed = RUNS.iter().map(|run| run.text).chain(ONLY_PARSED.map(|(text, _)| text));
    let unused: Vec<_> = listed.filter(|text| !texts.contains(*text)).collect();
    assert!(unused.is_empty(), "no document has these listed commands: {unused:?}");
}

/// A namespace may enforce another level, so that the label must replace that one before pods are created.
#[test]
fn namespace_is_labelled_before_the_installation() {
    if lacks_repository() {
        return;
    }
    let mut installations = 0;
    for document in documents() {
        let commands = document.blocks.iter().flat_map(|block| match content(block) {
            Ok(Content::Commands(commands)) => commands,
            _ => Vec::new(),
        });
        let commands: Vec<_> = commands.collect();
        let Some(install) = commands.iter().position(|command| command.text.starts_with("helm install "))
        else {
            continue;
        };
        installations += 1;
        let is_label = |command: &Documented| {
            command.text.starts_with("kubectl label namespace ") && command.text.contains(" --overwrite")
        };
        assert!(commands[..install].iter().any(is_label), "{}", commands[install].at);
    }
    assert!(installations >= 2);
}

#[test]
fn every_option_in_text_exists() {
    if lacks_repository() {
        return;
    }
    // Options of apt, curl, rpm, podman, wget and iptables.
    let others = [
        "--allow-downgrades",
        "--cap-add",
        "--fail",
        "--nosignature",
        "--oldpackage",
        "--security-opt",
        "--tries",
        "--uid-owner",
        "--volume",
    ];
    let mut unknown = Vec::new();
    for span in documents().iter().flat_map(|document| &document.spans) {
        let option = span.text.split([' ', '=']).next().unwrap_or_default();
        let is_option = option.len() > 2 && option.starts_with("--");
        if is_option
            && !agent_cli::has_option(option)
            && !plugin_cli::has_option(option)
            && !xtask_cli::has_option(option)
            && !artifacts::is_script_option(option)
            && !others.contains(&option)
        {
            unknown.push(format!("{}: {}", span.at, span.text));
        }
    }
    assert!(unknown.is_empty(), "{unknown:#?}");
}

#[test]
fn every_block_is_valid() {
    if lacks_repository() {
        return;
    }
    let env = TestEnv::new();
    let mut failures = Vec::new();
    for document in documents() {
        for block in &document.blocks {
            let result = match content(block) {
                Ok(Content::Commands(_)) => Ok(()),
                Ok(Content::Synopsis) => {
                    let is_plugin = block.lines[0].starts_with(plugin_cli::PROGRAM);
                    let compare =
                        if is_plugin { plugin_cli::synopsis_errors } else { agent_cli::synopsis_errors };
                    match compare(&block.lines) {
                        errors if errors.is_empty() => Ok(()),
                        errors => Err(errors.join("; ")),
                    }
                }
                Ok(Content::Data) => check_data(&env, &document, block),
                Err(error) => Err(error),
            };
            failures.extend(result.err().map(|error| format!("{}: {error}", block.at)));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

fn check_data(env: &TestEnv, document: &Document, block: &Block) -> Result<(), String> {
    let (path, text) = (document.path.to_str().unwrap_or_default(), block.lines.join("\n"));
    match (path, block.section.as_str(), block.language.as_deref()) {
        (_, _, Some("toml")) => check_config(env, &text),
        (_, _, Some("json")) => {
            serde_json::from_str::<serde_json::Value>(&text).map(drop).map_err(|error| error.to_string())
        }
        ("docs/commands.md", section, None) if OUTPUT.contains(&section) => Ok(()),
        ("docs/fleet.md", "status", None) => plugin_cli::check_titles(&text),
        ("docs/fleet.md", "Permissions", None) => plugin_cli::check_permissions(&text),
        ("README.md", "Demo", None) => check_demo(block),
        // The test `maps` looks for these pins, and `explain` for this text.
        ("docs/maps.md", "Pins and maps", None)
        | ("docs/explained-denials.md", "Explained denials", None) => Ok(()),
        ("docs/kubernetes-events.md", "Kubernetes Events", None) => check_event_reasons(document, &text),
        ("docs/metrics.md", "Run times of the programs", None) => check_expression(document, &text),
        // Receivers of the sinks. The test `sinks` runs rsyslog with this configuration.
        ("docs/siem.md", "Kubernetes" | "Receivers", Some("yaml" | "rsyslog")) => {
            check_receiver(document, &text)
        }
        ("docs/install-vm.md", "Rights of the service", None) => check_drop_in(&text),
        _ => Err("no rule checks a block of this kind in this section".to_owned()),
    }
}

/// Loads a configuration or a part of one, on a machine of Azure.
fn check_config(env: &TestEnv, text: &str) -> Result<(), String> {
    let file = env.scratch_dir().join("example.toml");
    let provider = if text.contains("provider =") { "" } else { "provider = 'azure'\n" };
    fs::write(&file, format!("{provider}{text}")).map_err(|error| error.to_string())?;
    let agent = env.imds_agent(&[]).command().get_program().to_owned();
    let output = imds_tests::output({
        let mut command = std::process::Command::new(agent);
        command.args(["config", "check"]).arg(&file);
        command
    });
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

/// Compares the table of the demo with the texts in its source. Does not run the demo, because it builds the agent.
fn check_demo(block: &Block) -> Result<(), String> {
    let source =
        fs::read_to_string(repository().join("xtask/src/demo.rs")).map_err(|error| error.to_string())?;
    let cells =
        block.lines.iter().flat_map(|line| line.split("  ")).map(str::trim).filter(|cell| !cell.is_empty());
    let is_address = |cell: &str| cell.chars().all(|char| char.is_ascii_digit() || char == '.');
    let cells = cells.map(|cell| cell.split_once(" 1").map_or(cell, |(label, _)| label));
    let unknown: BTreeSet<_> =
        cells.filter(|cell| !is_address(cell) && !source.contains(&format!("\"{cell}\""))).collect();
    if unknown.is_empty() { Ok(()) } else { Err(format!("xtask/src/demo.rs prints no {unknown:?}")) }
}

/// Checks that the document describes each metric of a query.
fn check_expression(document: &Document, expression: &str) -> Result<(), String> {
    let described = |metric: &String| document.spans.iter().any(|span| span.text == *metric);
    let unknown: Vec<_> =
        names_in(expression).metrics.into_iter().filter(|metric| !described(metric)).collect();
    if unknown.is_empty() {
        Ok(())
    } else {
        Err(format!("{} does not describe {unknown:?}", document.path.display()))
    }
}

/// Compares the reasons of Events in a document with those in the source, and the message of its example.
fn check_event_reasons(document: &Document, example: &str) -> Result<(), String> {
    let sources = ["controller/node_report.rs", "telemetry/pod_events/writer.rs"];
    let sources = sources.map(|path| tools::read(&format!("imds-agent/src/{path}"))).concat();
    let is_reason = |text: &&str| text.starts_with("Metadata") && text.chars().all(char::is_alphabetic);
    let written: BTreeSet<_> = sources.split('"').filter(is_reason).collect();
    let documented: BTreeSet<_> =
        document.spans.iter().map(|span| span.text.as_str()).filter(is_reason).collect();
    let message = example.contains(" access to the metadata endpoint ")
        && sources.contains(" access to the metadata endpoint ");
    tools::ensure(written == documented && message, || {
        format!("the agent writes {written:?}, documented are {documented:?}")
    })
}

/// Checks that the configuration of a receiver reads the file or the port of a documented sink.
fn check_receiver(document: &Document, text: &str) -> Result<(), String> {
    let targets = ["/var/log/imds-agent/denials.jsonl", ":4318", "\"601\""];
    let target = targets.into_iter().find(|target| text.contains(target));
    let target = target.ok_or("no sink of the document has its target here")?.trim_matches([':', '"']);
    let is_documented = document.blocks.iter().any(|block| {
        block.language.as_deref() == Some("toml") && block.lines.iter().any(|line| line.contains(target))
    });
    let is_described = document.spans.iter().any(|span| span.text.contains(target));
    if is_documented || is_described { Ok(()) } else { Err(format!("no sink of the document has {target}")) }
}

/// Checks that a drop-in of the unit changes a setting that the unit has, and adds no capability.
fn check_drop_in(text: &str) -> Result<(), String> {
    let path = repository().join("deploy/systemd/imds-agent.service");
    let unit = fs::read_to_string(path).map_err(|error| error.to_string())?;
    for line in text.lines().filter(|line| !line.starts_with('[')) {
        let (key, value) = line.split_once('=').ok_or_else(|| format!("{line:?} is no setting"))?;
        let set = unit.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        let set: Vec<_> = set.ok_or_else(|| format!("the unit has no {key}"))?.split(' ').collect();
        let added: Vec<_> = value.split(' ').filter(|word| !word.is_empty() && !set.contains(word)).collect();
        if !added.is_empty() {
            return Err(format!("the unit has no {added:?}"));
        }
    }
    Ok(())
}
