//! Lists rules of iptables and nftables and TC actions with the tools `iptables-save`, `nft` and `tc`. Changes no rule.

use std::{
    collections::BTreeSet,
    process::{Command, Stdio},
};

use serde_json::Value;

use super::{
    chains::{BaseHook, ChainId, Chains},
    iptables_rule,
    nft_rule::{self, NamedSets, TableSets},
    traffic::{Action, Branch},
};

/// Programs that list rules of iptables. One that prints the same rules as an earlier one is ignored.
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

#[derive(Debug, Default)]
pub(crate) struct Rulesets {
    /// Names of the programs that ran successfully.
    sources: Vec<&'static str>,
    pub(crate) rules: Vec<ListedRule>,
    /// TC actions `mirred`, as `tc -json actions list` prints them.
    pub(crate) actions: Vec<Value>,
    base_chains: Vec<(ChainId, BaseHook)>,
}

/// One firewall rule, with its parsed branches.
#[derive(Clone, Debug)]
pub(crate) struct ListedRule {
    pub(crate) chain: ChainId,
    /// Command that adds the rule, or its name.
    pub(crate) text: String,
    pub(crate) remove: String,
    /// Matched traffic and the verdicts for it.
    pub(crate) branches: Vec<Branch>,
}

impl Rulesets {
    pub(crate) fn list() -> Self {
        let mut rulesets = Self::default();
        let mut seen = BTreeSet::new();
        for save in SAVES {
            let Some(text) = run(save, &[]) else { continue };
            let program = save.trim_end_matches("-save");
            let family = save.split_once("tables").map_or("", |(family, _)| family);
            let variant = if text.contains("(nf_tables)") { "nf_tables" } else { "legacy" };
            if seen.insert((family, variant)) {
                rulesets.sources.push(program);
                rulesets.add_iptables(&text, program);
            }
        }
        if let Some(text) = run("nft", &["--json", "--handle", "list", "ruleset"]) {
            rulesets.sources.push("nft");
            let shown = seen.iter().filter(|(_, variant)| *variant == "nf_tables").map(|(family, _)| *family);
            let ruleset = serde_json::from_str(&text).unwrap_or_default();
            rulesets.add_nft(&ruleset, &shown.collect());
        }
        let listed = run("tc", &["-json", "actions", "list", "action", "mirred"]);
        let listed = listed.and_then(|text| serde_json::from_str(&text).ok());
        rulesets.actions.extend(listed.iter().flat_map(actions));
        rulesets
    }

    /// Reads one listing: the JSON form of `nft`, otherwise the text of `iptables-save`.
    pub(crate) fn from_listing(listing: &str) -> Self {
        let mut rulesets = Self::default();
        match serde_json::from_str(listing) {
            Ok(ruleset) => rulesets.add_nft(&ruleset, &BTreeSet::new()),
            Err(_) => rulesets.add_iptables(listing, "iptables"),
        }
        rulesets
    }

    /// Describes that no rule was found, or that none could be listed.
    pub(crate) fn none(&self, found: &str) -> String {
        if self.sources.is_empty() {
            return "unknown: neither iptables-save nor nft can be run here".to_owned();
        }
        format!("{found} ({})", self.sources.join(", "))
    }

    pub(crate) fn chains(&self) -> Chains {
        let actions = self
            .rules
            .iter()
            .flat_map(|rule| rule.branches.iter().map(move |branch| (&rule.chain, &branch.action)));
        Chains::new(self.base_chains.iter().cloned(), actions)
    }

    /// Adds the output of `iptables-save`. `program` is the command that changes these rules.
    fn add_iptables(&mut self, text: &str, program: &str) {
        let mut table = "";
        for line in text.lines() {
            let id = |name: &str| ChainId {
                family: program.to_owned(),
                table: table.to_owned(),
                name: name.to_owned(),
            };
            if let Some(name) = line.strip_prefix('*') {
                table = name;
            } else if let Some(chain) = line.strip_prefix(':') {
                let name = chain.split(' ').next().unwrap_or_default();
                self.base_chains.extend(name.parse().map(|hook| (id(name), hook)));
            } else if let Some(rule) = line.strip_prefix("-A ") {
                let words = words(rule);
                self.rules.push(ListedRule {
                    chain: id(words.first().map(String::as_str).unwrap_or_default()),
                    text: format!("{program} -t {table} -A {rule}"),
                    remove: format!("{program} -t {table} -D {rule}"),
                    branches: vec![iptables_rule::branch(&words)],
                });
            }
        }
    }

    /// Adds the output of `nft --json`, without the tables of iptables that it lists itself for the families in `shown`.
    fn add_nft(&mut self, ruleset: &Value, shown: &BTreeSet<&str>) {
        let entries = || ruleset["nftables"].as_array().into_iter().flatten();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let id = |entry: &Value, name: &str| ChainId {
            family: text(&entry["family"]),
            table: text(&entry["table"]),
            name: text(&entry[name]),
        };
        let base = |chain: &Value| Some((id(chain, "name"), chain["hook"].as_str()?.parse().ok()?));
        self.base_chains.extend(entries().filter_map(|entry| base(entry.get("chain")?)));
        let sets = NamedSets::from_entries(entries());
        for rule in entries().filter_map(|entry| entry.get("rule")) {
            let chain = id(rule, "chain");
            let ChainId { family, table, name } = &chain;
            if IPTABLES_TABLES.contains(&&**table) && shown.contains(&**family) {
                continue;
            }
            let expressions = rule["expr"].as_array().cloned().unwrap_or_default();
            let of_table = TableSets { sets: &sets, family, table };
            let whole = format!("{family} {table} {name} handle {}", rule["handle"]);
            self.rules.push(ListedRule {
                text: format!("nft rule {whole}"),
                remove: format!("nft delete rule {whole}"),
                branches: nft_rule::branches(&expressions, of_table),
                chain,
            });
        }
    }
}

impl ListedRule {
    /// Reports whether the rule jumps to a chain in which packets can be denied or redirected.
    pub(crate) fn leads_to_denial(&self, action: &Action, chains: &Chains) -> bool {
        matches!(action, Action::Jump(name) if chains.can_deny(&ChainId { name: name.clone(), ..self.chain.clone() }))
    }
}

/// Runs a program and returns its output; `None` if it does not exist or fails.
fn run(program: &str, arguments: &[&str]) -> Option<String> {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stderr(Stdio::null());
    let output = command.output().ok().filter(|output| output.status.success())?;
    String::from_utf8(output.stdout).ok()
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

/// Returns the objects with a `kind` in the output of `tc -json actions list`, at any depth.
pub(crate) fn actions(listed: &Value) -> Vec<Value> {
    match listed {
        Value::Array(values) => values.iter().flat_map(actions).collect(),
        Value::Object(object) if object.contains_key("kind") => vec![listed.clone()],
        Value::Object(object) => object.values().flat_map(actions).collect(),
        _ => Vec::new(),
    }
}
