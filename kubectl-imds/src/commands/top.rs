//! `kubectl imds top`: the senders with the most denials in an interval, over all nodes.

use std::{
    collections::{BTreeSet, HashMap},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io::{self, IsTerminal as _},
    process::ExitCode,
    time::Duration,
};

use anyhow::Result;
use serde::Serialize;
use tokio::time::{Instant, sleep_until};

use super::{
    denial::{self, Denial, DenialKey},
    output::{Columns, Format, SCHEMA, count, errors_text, exit_code, print, write_stdout},
};
use crate::fleet::{Fleet, NodeError};

/// Moves the cursor to the top left and clears the screen.
const CLEAR: &str = "\x1b[H\x1b[2J";

#[derive(Clone, Copy, Debug)]
pub(crate) struct TopOptions {
    pub(crate) format: Format,
    pub(crate) interval: Duration,
    /// Senders to show.
    pub(crate) limit: usize,
    /// Print one interval and exit.
    pub(crate) once: bool,
}

/// Counts of the previous answers, by node and sender. Hashes, because a fleet has many of them.
#[derive(Debug, Default)]
struct Counts(HashMap<u64, u64>);

/// Denials of an interval.
#[derive(Debug, Serialize)]
struct Interval {
    schema: u32,
    /// Length of the interval.
    seconds: f64,
    /// Nodes whose denials of the interval are known.
    nodes: usize,
    senders: Vec<TopSender>,
    errors: Vec<NodeError>,
    limitations: Vec<String>,
}

#[derive(Clone, Debug, Serialize)]
struct TopSender {
    #[serde(flatten)]
    key: DenialKey,
    /// Packets and calls in the interval.
    count: u64,
    per_second: f64,
    /// Nodes that denied the sender in the interval.
    nodes: usize,
}

/// Shows the senders until it is interrupted, or once.
pub(crate) async fn top(fleet: &Fleet, options: &TopOptions) -> Result<ExitCode> {
    let is_screen = io::stdout().is_terminal() && !options.once && options.format == Format::Table;
    let mut previous = Counts::default();
    let mut known = BTreeSet::new();
    let mut start = Instant::now();
    let (first, _) = sample(fleet, &mut previous, &mut known).await;
    // The first answer has all denials since the records were cleared: only differences are of an interval.
    drop(first);
    loop {
        sleep_until(start + options.interval).await;
        let end = Instant::now();
        let (mut interval, errors) = sample(fleet, &mut previous, &mut known).await;
        interval.finish((end - start).as_secs_f64(), options.limit, errors, fleet.limitations.clone());
        start = end;
        if is_screen {
            write_stdout(format!("{CLEAR}{}", interval.table()))?;
        } else {
            print(options.format, &interval, &interval.limitations, Interval::table)?;
        }
        if options.once {
            return Ok(exit_code(interval.errors.is_empty()));
        }
    }
}

/// Requests the denials of all nodes. Returns those since the previous sample.
async fn sample(
    fleet: &Fleet,
    previous: &mut Counts,
    known: &mut BTreeSet<String>,
) -> (Interval, Vec<NodeError>) {
    let mut merged = HashMap::<DenialKey, TopSender>::new();
    let mut nodes = 0;
    let errors = fleet
        .ask(
            async |target| Ok(denial::ask(fleet, target).await?.denials),
            |target, denials| {
                // The first answer of a node has denials from before the interval.
                let is_known = !known.insert(target.node.clone());
                nodes += usize::from(is_known);
                for (key, count) in previous.update(&target.node, denials) {
                    if is_known && count > 0 {
                        let empty = TopSender { key: key.clone(), count: 0, per_second: 0.0, nodes: 0 };
                        let sender = merged.entry(key).or_insert(empty);
                        sender.count = sender.count.saturating_add(count);
                        sender.nodes += 1;
                    }
                }
            },
        )
        .await;
    let senders = merged.into_values().collect();
    let interval = Interval {
        schema: SCHEMA,
        seconds: 0.0,
        nodes,
        senders,
        errors: Vec::new(),
        limitations: Vec::new(),
    };
    (interval, errors)
}

impl Counts {
    /// Replaces the counts of a node. Returns the increase of each sender.
    fn update(&mut self, node: &str, denials: Vec<Denial>) -> Vec<(DenialKey, u64)> {
        let increase = |Denial { key, counts, .. }: Denial| {
            let mut hasher = DefaultHasher::new();
            (node, &key).hash(&mut hasher);
            let now = counts.into_values().fold(0, u64::saturating_add);
            let before = self.0.insert(hasher.finish(), now).unwrap_or_default();
            // `report --reset` clears the records: all are then new.
            (key, now.checked_sub(before).unwrap_or(now))
        };
        denials.into_iter().map(increase).collect()
    }
}

impl Interval {
    fn finish(&mut self, seconds: f64, limit: usize, errors: Vec<NodeError>, limitations: Vec<String>) {
        self.senders.sort_by(|a, b| (b.count, &a.key).cmp(&(a.count, &b.key)));
        self.senders.truncate(limit);
        for sender in &mut self.senders {
            sender.per_second = rate(sender.count, seconds);
        }
        (self.seconds, self.errors, self.limitations) = (seconds, errors, limitations);
    }

    fn table(&self) -> String {
        let mut columns = Columns::new(["SENDER", "ENDPOINT", "VERDICT", "NODES", "COUNT", "PER SECOND"]);
        for TopSender { key, count, per_second, nodes } in &self.senders {
            columns.add([
                key.sender().to_string(),
                key.endpoint().to_owned(),
                key.verdict().to_owned(),
                nodes.to_string(),
                count.to_string(),
                format!("{per_second:.1}"),
            ]);
        }
        let nodes = count(self.nodes, "node");
        let title = format!("denials of {:.0} s on {nodes}\n\n", self.seconds);
        let rows = if self.senders.is_empty() { "none\n".to_owned() } else { columns.finish() };
        title + &rows + &errors_text(&self.errors)
    }
}

#[expect(clippy::cast_precision_loss, reason = "a rate is shown with one decimal")]
fn rate(count: u64, seconds: f64) -> f64 {
    if seconds > 0.0 { count as f64 / seconds } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::{super::denial::tests::denial, *};

    const TIME: &str = "2026-11-23T15:04:05Z";

    #[test]
    fn counts_increase_by_node() {
        let mut counts = Counts::default();
        let mut update = |node, count| {
            counts
                .update(node, vec![denial(Some("tools"), count, TIME)])
                .into_iter()
                .map(|(_, count)| count)
                .sum::<u64>()
        };
        let updates =
            [("a", 5), ("b", 7), ("a", 8), ("a", 8), ("a", 2)].map(|(node, count)| update(node, count));
        assert_eq!(updates, [5, 7, 3, 0, 2]);
    }

    #[test]
    fn most_denied_senders_are_first() {
        let sender = |namespace: &str, count| TopSender {
            key: denial(Some(namespace), 1, TIME).key,
            count,
            per_second: 0.0,
            nodes: 2,
        };
        let mut interval = Interval {
            schema: SCHEMA,
            seconds: 0.0,
            nodes: 3,
            senders: vec![sender("a", 1), sender("c", 30), sender("b", 30)],
            errors: Vec::new(),
            limitations: Vec::new(),
        };
        interval.finish(10.0, 2, Vec::new(), Vec::new());
        let expected = "denials of 10 s on 3 nodes

 SENDER         ENDPOINT  VERDICT  NODES  COUNT  PER SECOND
 b/web app=web  imds      denied   2      30     3.0
 c/web app=web  imds      denied   2      30     3.0
";
        assert_eq!(interval.table(), expected);
    }
}
