//! Verdict over a soak test.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use imds_tests::stability::{growth, median};

use crate::sample::{Object, Row};

/// Allowed growth of the agent's memory in KiB, which covers memory that the allocator caches.
const MEMORY: i64 = 1024;
/// Allowed growth of the number of descriptors, which covers descriptors that are open for a moment.
const DESCRIPTORS: i64 = 2;

/// All measured results, on which the verdict depends.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    agents: Vec<Usage>,
    /// Number of kernel objects before and after each agent's pods.
    pub(crate) objects_at_rest: Vec<BTreeMap<String, usize>>,
    /// Packets to the metadata service from pods that were never exempt.
    strangers: u64,
    /// Number of events of all agents. The next fields count suppressed and pending ones.
    emitted: u64,
    suppressed: u64,
    /// Number of events and suppressed events that the subscribers received.
    received: (u64, u64),
    pending: u64,
    counted: u64,
    denied: u64,
    pub(crate) objects: BTreeSet<Object>,
    /// Objects that remain after `unload`.
    pub(crate) left: Vec<String>,
}

/// Resource usage of one agent and its growth.
#[derive(Debug)]
struct Usage {
    memory: Measured,
    descriptors: Measured,
    reloads: u64,
    rejected: u64,
    failed_scrapes: u64,
}

#[derive(Debug)]
struct Measured {
    median: u64,
    growth: Option<i64>,
}

impl Measured {
    fn from_values(values: &[u64]) -> Self {
        Self { median: median(values).unwrap_or_default(), growth: growth(values) }
    }

    fn is_steady(&self, most: i64) -> bool {
        self.growth.is_some_and(|growth| growth <= most)
    }
}

impl fmt::Display for Measured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.growth {
            Some(growth) => write!(f, "{} ({growth:+})", self.median),
            None => write!(f, "{} (too few samples)", self.median),
        }
    }
}

impl Outcome {
    /// Adds the samples of one agent. `last` is the sample after the load ended.
    pub(crate) fn add(&mut self, rows: &[Row], last: &Row, received: (u64, u64), objects: BTreeSet<Object>) {
        let all = |get: fn(&Row) -> u64| rows.iter().map(get).collect::<Vec<_>>();
        self.agents.push(Usage {
            memory: Measured::from_values(&all(|row| row.anonymous)),
            descriptors: Measured::from_values(&all(|row| row.descriptors)),
            reloads: last.reloads,
            rejected: last.rejected,
            failed_scrapes: last.failed_scrapes,
        });
        self.emitted += last.emitted;
        self.suppressed += last.suppressed;
        self.received = (self.received.0 + received.0, self.received.1 + received.1);
        (self.pending, self.counted, self.denied) = (last.pending, last.counted, last.denied);
        self.strangers = last.strangers;
        self.objects.extend(objects);
    }

    pub(crate) fn is_good(&self) -> bool {
        self.checks().iter().all(|(is_good, _)| *is_good)
    }

    fn checks(&self) -> Vec<(bool, String)> {
        let mut checks = vec![(
            self.strangers == 0 && self.denied > 0,
            format!(
                "{} packets denied, {} arrived from pods that were never exempt",
                self.denied, self.strangers
            ),
        )];
        for (number, agent) in (1..).zip(&self.agents) {
            let Usage { memory, descriptors, reloads, rejected, failed_scrapes } = agent;
            checks.extend([
                (memory.is_steady(MEMORY), format!("agent {number}: {memory} KiB of anonymous memory")),
                (descriptors.is_steady(DESCRIPTORS), format!("agent {number}: {descriptors} descriptors")),
                (
                    *reloads > 0 && *rejected > 0 && *failed_scrapes == 0,
                    format!(
                        "agent {number}: {reloads} configurations loaded, {rejected} rejected, {failed_scrapes} reads of \
                         metrics failed"
                    ),
                ),
            ]);
        }
        let explained = self.emitted + self.suppressed + self.pending;
        checks.push((
            explained == self.counted,
            format!(
                "{} packets and calls counted = {} events + {} suppressed + {} pending",
                self.counted, self.emitted, self.suppressed, self.pending
            ),
        ));
        checks.push((
            self.received == (self.emitted, self.suppressed),
            format!("subscribers received {} events and {} suppressed", self.received.0, self.received.1),
        ));
        let are_objects_stable = self.objects_at_rest.windows(2).all(|pair| pair[0] == pair[1]);
        checks.push((are_objects_stable, format!("kernel objects at rest: {:?}", self.objects_at_rest)));
        checks.push((
            self.left.is_empty(),
            format!("after unload, of {} programs and maps: {:?} left", self.objects.len(), self.left),
        ));
        checks
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "in brackets: the median of the last third of an agent's run minus that of the middle third\n\
             (at most {MEMORY} KiB and {DESCRIPTORS} descriptors)"
        )?;
        for (is_good, what) in self.checks() {
            writeln!(f, "{} {what}", if is_good { "ok  " } else { "FAIL" })?;
        }
        write!(f, "{}", if self.is_good() { "the agent passed" } else { "the agent FAILED" })
    }
}
