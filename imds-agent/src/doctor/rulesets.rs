//! Rules of iptables, nftables and TC actions, as their own programs list them. No rule is ever changed.

use std::{
    collections::BTreeSet,
    process::{Command, Stdio},
};

use serde_json::Value;

/// Programs that list rules of iptables. Some list the same rules as one before, and are then ignored.
const SAVES: [&str; 6] = [
    "iptables-save",
    "iptables-legacy-save",
    "iptables-nft-save",
    "ip6tables-save",
    "ip6tables-legacy-save",
    "ip6tables-nft-save",
];
/// Tables of nftables that iptables manages.
const IPTABLES_TABLES: [&str; 5] = ["filter", "mangle", "nat", "raw", "security"];

/// Everything that the programs on this node list.
#[derive(Debug, Default)]
pub(super) struct Rulesets {
    /// Programs that could be run.
    pub(super) sources: Vec<&'static str>,
    pub(super) rules: Vec<ListedRule>,
    /// TC actions, as `tc -json actions list` prints them.
    pub(super) actions: Vec<Value>,
}

/// One rule of a firewall.
#[derive(Clone, Debug)]
pub(super) struct ListedRule {
    pub(super) table: String,
    pub(super) chain: String,
    /// The command that adds the rule, or its name.
    pub(super) text: String,
    /// The command that removes the rule.
    pub(super) remove: String,
    /// True if the chain sees only packets that the node itself sends or receives.
    pub(super) is_local: bool,
    pub(super) body: Body,
}

/// Matches and targets of a rule.
#[derive(Clone, Debug)]
pub(super) enum Body {
    /// Words of `iptables-save`, from the chain on.
    Iptables(Vec<String>),
    /// Expressions of `nft --json`.
    Nft(Vec<Value>),
}

impl Rulesets {
    /// Lists all rules that the programs on this node show.
    pub(super) fn list() -> Self {
        let mut rulesets = Self::default();
        let mut seen = BTreeSet::new();
        for save in SAVES {
            let Some(text) = run(save, &[]) else { continue };
            let program = save.trim_end_matches("-save");
            let family = save.split_once("tables").map_or("", |(family, _)| family);
            let variant = if text.contains("(nf_tables)") { "nf_tables" } else { "legacy" };
            if seen.insert((family, variant)) {
                rulesets.sources.push(program);
                rulesets.rules.extend(of_iptables(&text, program));
            }
        }
        if let Some(text) = run("nft", &["--json", "--handle", "list", "ruleset"]) {
            rulesets.sources.push("nft");
            let shown = seen.iter().filter(|(_, variant)| *variant == "nf_tables").map(|(family, _)| *family);
            let ruleset = serde_json::from_str(&text).unwrap_or_default();
            rulesets.rules.extend(of_nft(&ruleset, &shown.collect()));
        }
        for kind in ["skbedit", "connmark"] {
            let listed = run("tc", &["-json", "actions", "list", "action", kind]);
            let listed = listed.and_then(|text| serde_json::from_str(&text).ok());
            rulesets.actions.extend(listed.iter().flat_map(actions));
        }
        rulesets
    }
}

/// Output of a program that is there and succeeds.
fn run(program: &str, arguments: &[&str]) -> Option<String> {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stderr(Stdio::null());
    let output = command.output().ok().filter(|output| output.status.success())?;
    String::from_utf8(output.stdout).ok()
}

/// Reads the output of `iptables-save`. `program` is the command that changes these rules.
pub(super) fn of_iptables(text: &str, program: &str) -> Vec<ListedRule> {
    let mut table = "";
    let mut found = Vec::new();
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('*') {
            table = name;
        } else if let Some(rule) = line.strip_prefix("-A ") {
            let words = words(rule);
            let chain = words.first().cloned().unwrap_or_default();
            found.push(ListedRule {
                table: table.to_owned(),
                text: format!("{program} -t {table} -A {rule}"),
                remove: format!("{program} -t {table} -D {rule}"),
                is_local: ["INPUT", "OUTPUT"].contains(&&*chain),
                chain,
                body: Body::Iptables(words),
            });
        }
    }
    found
}

/// Splits a line into words, some of which are in double quotes.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut word, mut is_quoted, mut characters) =
        (Vec::new(), String::new(), false, line.chars());
    while let Some(character) = characters.next() {
        match character {
            '"' => is_quoted = !is_quoted,
            '\\' if is_quoted => word.extend(characters.next()),
            ' ' if !is_quoted => words.push(std::mem::take(&mut word)),
            _ => word.push(character),
        }
    }
    words.push(word);
    words
}

/// Reads the output of `nft --json`, without the tables of iptables that it lists itself for the families in `shown`.
pub(super) fn of_nft(ruleset: &Value, shown: &BTreeSet<&str>) -> Vec<ListedRule> {
    let entries = || ruleset["nftables"].as_array().into_iter().flatten();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let name = |entry: &Value, chain: &str| ["family", "table", chain].map(|key| text(&entry[key]));
    let is_local_hook = |chain: &Value| matches!(chain["hook"].as_str(), Some("input" | "output"));
    let chains = entries().filter_map(|entry| entry.get("chain"));
    let local: BTreeSet<_> =
        chains.filter(|chain| is_local_hook(chain)).map(|chain| name(chain, "name")).collect();
    let mut found = Vec::new();
    for rule in entries().filter_map(|entry| entry.get("rule")) {
        let name = name(rule, "chain");
        let is_local = local.contains(&name);
        let [family, table, chain] = name;
        if IPTABLES_TABLES.contains(&&*table) && shown.contains(&*family) {
            continue;
        }
        let whole = format!("{family} {table} {chain} handle {}", rule["handle"]);
        found.push(ListedRule {
            text: format!("nft rule {whole}"),
            remove: format!("nft delete rule {whole}"),
            table,
            chain,
            is_local,
            body: Body::Nft(rule["expr"].as_array().cloned().unwrap_or_default()),
        });
    }
    found
}

/// Objects with a `kind` in the output of `tc -json actions list`, at any depth.
pub(super) fn actions(listed: &Value) -> Vec<Value> {
    match listed {
        Value::Array(values) => values.iter().flat_map(actions).collect(),
        Value::Object(object) if object.contains_key("kind") => vec![listed.clone()],
        Value::Object(object) => object.values().flat_map(actions).collect(),
        _ => Vec::new(),
    }
}
