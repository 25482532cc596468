//! `kubectl imds report`: denials and requests of all nodes, and the rules that would exempt their senders.

mod merged_rules;
pub(super) mod requests;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    process::ExitCode,
};

use anyhow::Result;
use jiff::Timestamp;
use serde::Serialize;

use self::{
    merged_rules::MergedRules,
    requests::{MergedRequest, MergedRequests},
};
use super::{
    denial::{self, Denial, DenialKey},
    output::{Columns, Format, SCHEMA, count, errors_text, exit_code, print, write_stderr, write_stdout},
};
use crate::fleet::{Fleet, NodeError};

/// Senders that a report can have. Beyond them, a compromised node could exhaust the memory.
const MAX_DENIALS: usize = 20_000;

/// Denials of all nodes.
#[derive(Debug, Serialize)]
struct FleetReport {
    schema: u32,
    /// Nodes that answered.
    nodes: usize,
    denials: Vec<MergedDenial>,
    requests: Vec<MergedRequest>,
    /// Rules of the configuration file that would exempt all senders.
    rules: String,
    errors: Vec<NodeError>,
    limitations: Vec<String>,
}

#[derive(Debug, Serialize)]
struct MergedDenial {
    #[serde(flatten)]
    key: DenialKey,
    #[serde(flatten)]
    sum: Sum,
}

#[derive(Clone, Debug, Serialize)]
struct Sum {
    nodes: usize,
    counts: BTreeMap<String, u64>,
    bytes: u64,
    first: Timestamp,
    last: Timestamp,
}

/// Denials of the nodes that have answered so far.
#[derive(Debug, Default)]
struct Merged {
    nodes: usize,
    denials: BTreeMap<DenialKey, Sum>,
    requests: MergedRequests,
    dropped: usize,
}

/// Prints the denials of all nodes. The exit code is that of a failed check unless all nodes answered.
pub(crate) async fn report(fleet: &Fleet, format: Format) -> Result<ExitCode> {
    let (mut merged, mut rules) = (Merged::default(), MergedRules::default());
    let errors = fleet
        .ask(
            async |target| {
                let document = denial::ask(fleet, target).await?;
                Ok((document.denials, document.requests, merged_rules::parse(&document.rules)?))
            },
            |_, (denials, requests, of_node)| {
                merged.add(denials);
                merged.requests.add(requests);
                rules.add(of_node);
            },
        )
        .await;
    let is_complete = errors.is_empty();
    let report = merged.finish(rules.to_toml(), errors, fleet.limitations.clone());
    print(format, &report, &report.limitations, FleetReport::table)?;
    Ok(exit_code(is_complete))
}

/// Prints only the rules. Nodes without an answer are listed on standard error.
pub(crate) async fn rules(fleet: &Fleet) -> Result<ExitCode> {
    let mut rules = MergedRules::default();
    let errors = fleet
        .ask(
            async |target| merged_rules::parse(&denial::ask(fleet, target).await?.rules),
            |_, of_node| rules.add(of_node),
        )
        .await;
    write_stdout(rules.to_toml())?;
    for limitation in &fleet.limitations {
        write_stderr(limitation);
    }
    if !errors.is_empty() {
        let nodes = count(errors.len(), "node");
        write_stderr(&format!("the rules are incomplete: {nodes} without an answer"));
        errors_text(&errors).lines().skip(2).for_each(|line| write_stderr(line.trim()));
    }
    Ok(exit_code(errors.is_empty()))
}

impl Merged {
    fn add(&mut self, denials: Vec<Denial>) {
        self.nodes += 1;
        let mut of_node = BTreeSet::new();
        for Denial { key, counts, bytes, first, last } in denials {
            if self.denials.len() >= MAX_DENIALS && !self.denials.contains_key(&key) {
                self.dropped += 1;
                continue;
            }
            let is_new = of_node.insert(key.clone());
            let empty = Sum { nodes: 0, counts: BTreeMap::new(), bytes: 0, first, last };
            let sum = self.denials.entry(key).or_insert(empty);
            sum.nodes += usize::from(is_new);
            for (hook, number) in counts {
                let total = sum.counts.entry(hook).or_default();
                *total = total.saturating_add(number);
            }
            sum.bytes = sum.bytes.saturating_add(bytes);
            sum.first = sum.first.min(first);
            sum.last = sum.last.max(last);
        }
    }

    fn finish(self, rules: String, errors: Vec<NodeError>, mut limitations: Vec<String>) -> FleetReport {
        if self.dropped > 0 {
            let text = format!("{} more denials of other senders are not shown", self.dropped);
            limitations.push(text);
        }
        let (requests, dropped) = self.requests.finish();
        if dropped > 0 {
            limitations.push(format!("{dropped} more requests are not shown"));
        }
        let mut denials: Vec<_> =
            self.denials.into_iter().map(|(key, sum)| MergedDenial { key, sum }).collect();
        denials.sort_by_key(|denial| {
            std::cmp::Reverse(denial.sum.counts.values().copied().fold(0, u64::saturating_add))
        });
        FleetReport { schema: SCHEMA, nodes: self.nodes, denials, requests, rules, errors, limitations }
    }
}

impl FleetReport {
    fn table(&self) -> String {
        let hooks: BTreeSet<_> =
            self.denials.iter().flat_map(|denial| denial.sum.counts.keys().map(String::as_str)).collect();
        let titles = hooks.iter().map(|hook| hook.to_uppercase());
        let before = ["SENDER", "ENDPOINT", "VERDICT", "NODES"].map(str::to_owned).into_iter();
        let mut columns =
            Columns::new(before.chain(titles).chain(["BYTES", "FIRST", "LAST"].map(str::to_owned)));
        for MergedDenial { key, sum } in &self.denials {
            let known =
                [key.sender().to_string(), key.endpoint().to_owned(), key.verdict().to_owned()].into_iter();
            let counts =
                hooks.iter().map(|&hook| sum.counts.get(hook).copied().unwrap_or_default().to_string());
            let times = [sum.first, sum.last].map(|time| format!("{time:.0}"));
            columns.add(
                known
                    .chain([sum.nodes.to_string()])
                    .chain(counts)
                    .chain([sum.bytes.to_string()])
                    .chain(times),
            );
        }
        let nodes = count(self.nodes, "node");
        if self.denials.is_empty() && self.requests.is_empty() {
            return format!("no denials are recorded on {nodes}\n{}", errors_text(&self.errors));
        }
        let mut text = columns.finish();
        // Writing to a string does not fail.
        if !self.denials.is_empty() {
            let _ok = writeln!(text, "\n{} on {nodes}", count(self.denials.len(), "sender"));
        }
        if !self.requests.is_empty() {
            text += if text.is_empty() { "" } else { "\n" };
            text += &requests::table(&self.requests);
            let _ok = writeln!(text, "\n{} on {nodes}", count(self.requests.len(), "request"));
        }
        if !self.rules.is_empty() {
            text += "\nrules that would exempt these senders:\n\n";
            text += self.rules.trim_end();
            text.push('\n');
        }
        text + &errors_text(&self.errors)
    }
}

#[cfg(test)]
mod tests {
    use super::{super::denial::tests::denial, *};

    #[test]
    fn equal_senders_are_merged() {
        let (early, late) = ("2026-11-23T15:04:05Z", "2026-11-23T16:04:05.123Z");
        let mut merged = Merged::default();
        merged.add(vec![denial(Some("tools"), 2, late), denial(None, 1, early)]);
        merged.add(vec![denial(Some("tools"), 3, early)]);
        merged.add(Vec::new());
        let report = merged.finish(String::new(), Vec::new(), Vec::new());
        let expected = " SENDER                           ENDPOINT  VERDICT  NODES  FROM_POD  BYTES  FIRST                 LAST
 tools/web app=web                imds      denied   2      5         300    2026-11-23T15:04:05Z  2026-11-23T16:04:05Z
 curl in /system.slice/a.service  imds      denied   1      1         60     2026-11-23T15:04:05Z  2026-11-23T15:04:05Z

2 senders on 3 nodes
";
        assert_eq!(report.table(), expected);
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(
            (&json["denials"][0]["namespace"], &json["denials"][0]["nodes"]),
            (&"tools".into(), &2.into())
        );
    }

    #[test]
    fn number_of_senders_is_limited() {
        let mut merged = Merged::default();
        for number in 0..MAX_DENIALS + 2 {
            merged.add(vec![denial(Some(&number.to_string()), 1, "2026-11-23T15:04:05Z")]);
        }
        let report = merged.finish(String::new(), Vec::new(), Vec::new());
        assert_eq!(report.denials.len(), MAX_DENIALS);
        assert_eq!(report.limitations, ["2 more denials of other senders are not shown"]);
    }
}
