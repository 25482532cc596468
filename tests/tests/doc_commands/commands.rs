//! Commands in the documents.

use crate::markdown::{Block, Document};

/// Programs of documented commands. A block whose first word is none of these contains no command.
const PROGRAMS: [&str; 44] = [
    "/imds-agent",
    "apparmor_parser",
    "apt",
    "apt-get",
    "az",
    "bpftool",
    "cargo",
    "cd",
    "curl",
    "dmesg",
    "docker",
    "findmnt",
    "helm",
    "imds-agent",
    "install",
    "ip",
    "iptables",
    "journalctl",
    "kubectl",
    "kustomize",
    "ls",
    "minisign",
    "mount",
    "nft",
    "nsenter",
    "podman",
    "promtool",
    "restorecon",
    "rm",
    "rpm",
    "rustup",
    "semodule",
    "sh",
    "sha256sum",
    "skopeo",
    "ss",
    "stat",
    "sysctl",
    "systemctl",
    "systemd-analyze",
    "tar",
    "tc",
    "ulimit",
    "uname",
];

/// Documents with commands for users.
pub(crate) fn documents() -> Vec<Document> {
    let names = ["README.md", "CONTRIBUTING.md", "SECURITY.md"];
    let mut documents: Vec<_> = names.map(|name| Document::read(name.as_ref())).into();
    documents.extend(crate::markdown::read_directory("docs", true));
    documents
}

/// A command line of a document.
#[derive(Clone, Debug)]
pub(crate) struct Documented {
    /// File and line of the block or paragraph.
    pub(crate) at: String,
    /// Text without comment, and with joined lines.
    pub(crate) text: String,
    /// Output that the document shows beneath the command.
    pub(crate) output: Vec<String>,
    pub(crate) is_span: bool,
}

/// Kind of text that a block contains.
pub(crate) enum Content {
    Commands(Vec<Documented>),
    /// Usage of `imds-agent` with options in brackets.
    Synopsis,
    /// Output, configuration or another text.
    Data,
}

/// Returns the commands of a block. A line of a block of commands is a command, or continues one; after the prompt `# `
/// it can also be output.
pub(crate) fn content(block: &Block) -> Result<Content, String> {
    let Some(first) = block.lines.first() else { return Err("empty block".to_owned()) };
    let has_prompt = first.starts_with("# ");
    if !has_prompt && !is_command(first) || block.language.is_some() {
        return Ok(Content::Data);
    }
    if block.lines.iter().any(|line| line.contains(" [-")) {
        return Ok(Content::Synopsis);
    }
    let mut commands = Vec::<Documented>::new();
    for line in block.lines.iter().filter(|line| !line.is_empty()) {
        if let Some(open) = commands.last_mut().filter(|command| is_open(command)) {
            open.text.push('\n');
            open.text.push_str(without_comment(line));
            continue;
        }
        let command = if has_prompt { line.strip_prefix("# ") } else { Some(line.as_str()) };
        match (command, commands.last_mut()) {
            (Some(text), _) if is_command(text) => commands.push(Documented {
                at: block.at.clone(),
                text: without_comment(text).to_owned(),
                output: Vec::new(),
                is_span: false,
            }),
            (None, Some(command)) => command.output.push(line.clone()),
            _ => return Err(format!("{}: no known program starts {line:?}", block.at)),
        }
    }
    Ok(Content::Commands(commands))
}

/// Returns the code spans that are commands: a program or subcommand of imds-agent, and at least one argument.
pub(crate) fn commands_in_text(document: &Document) -> Vec<Documented> {
    let spans = document.spans.iter().filter_map(|span| {
        let (first, rest) = span.text.split_once(' ')?;
        let text = if PROGRAMS.contains(&first) {
            span.text.clone()
        } else if crate::agent_cli::is_subcommand(first) && !rest.starts_with('=') {
            format!("imds-agent {}", span.text)
        } else {
            return None;
        };
        Some(Documented { at: span.at.clone(), text, output: Vec::new(), is_span: true })
    });
    spans.collect()
}

fn is_command(line: &str) -> bool {
    words(line).first().is_some_and(|word| PROGRAMS.contains(&word.as_str()))
}

/// Reports whether the next line belongs to the command.
fn is_open(command: &Documented) -> bool {
    let text = &command.text;
    command.output.is_empty() && (text.matches('\'').count() % 2 == 1 || text.ends_with(['\\', '|']))
}

fn without_comment(line: &str) -> &str {
    line.split_once("  #").map_or(line, |(command, _)| command).trim_end()
}

/// Splits a command line at pipes and lists, and each simple command into words. Assignments of variables and
/// redirections are left out.
pub(crate) fn simple_commands(text: &str) -> Vec<Vec<String>> {
    let mut commands = vec![Vec::new()];
    let mut is_target = false;
    for word in shell_words(text) {
        let command = commands.last_mut().expect("one is there from the start");
        match word.as_str() {
            "|" | "&&" => commands.push(Vec::new()),
            ">" | ">>" | "<" => is_target = true,
            _ if is_target => is_target = false,
            _ if command.is_empty() && is_assignment(&word) => {}
            _ => command.push(word),
        }
    }
    commands
}

fn words(text: &str) -> Vec<String> {
    simple_commands(text).swap_remove(0)
}

fn is_assignment(word: &str) -> bool {
    let name = word.split_once('=').map(|(name, _)| name);
    name.is_some_and(|name| name.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'_'))
}

fn shell_words(text: &str) -> Vec<String> {
    let (mut words, mut word, mut quote) = (Vec::new(), None::<String>, None);
    let mut chars = text.chars().peekable();
    while let Some(char) = chars.next() {
        match (quote, char) {
            (Some(open), _) if char == open => quote = None,
            (None, '\'' | '"') => {
                quote = Some(char);
                word.get_or_insert_default();
            }
            (None, '\\') if chars.next_if_eq(&'\n').is_some() => {}
            (None, _) if char.is_whitespace() => words.extend(word.take()),
            _ => word.get_or_insert_default().push(char),
        }
    }
    words.extend(word);
    words
}

#[test]
fn command_lines_are_split() {
    let text = "A=1 b 'c d' \\\n  --e=\"f g\" | h > i && j < k";
    assert_eq!(simple_commands(text), [vec!["b", "c d", "--e=f g"], vec!["h"], vec!["j"]]);
}
