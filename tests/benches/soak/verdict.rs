//! What comes of it all.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use imds_tests::steady::{growth, median};

use crate::sample::{Object, Row};

/// By how much the memory of an agent may grow, in KiB: what an allocator keeps of its ups and downs.
const MEMORY: i64 = 1024;
/// The same of its descriptors: those that are open for a moment.
const DESCRIPTORS: i64 = 2;

/// All that is judged.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    agents: Vec<Usage>,
    /// What was in the kernel before and after each agent's pods.
    pub(crate) held_at_rest: Vec<BTreeMap<String, usize>>,
    /// Packets to the metadata service of pods that were never exempt.
    strangers: u64,
    /// Of all agents: events that were told, and those that these say were not.
    told: u64,
    suppressed: u64,
    /// The same as the followers heard it.
    heard: (u64, u64),
    untold: u64,
    counted: u64,
    denied: u64,
    pub(crate) objects: BTreeSet<Object>,
    /// What there still is after `unload`.
    pub(crate) left: Vec<String>,
}

/// What one agent took, and by how much that grew.
#[derive(Debug)]
struct Usage {
    memory: Measured,
    descriptors: Measured,
    reloads: u64,
    refused: u64,
    failed_scrapes: u64,
}

#[derive(Debug)]
struct Measured {
    median: u64,
    growth: Option<i64>,
}

impl Measured {
    fn of(values: &[u64]) -> Self {
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
            None => write!(f, "{} (too few to tell)", self.median),
        }
    }
}

impl Outcome {
    /// Takes in what was seen of one agent, `last` of all at rest.
    pub(crate) fn add(&mut self, rows: &[Row], last: &Row, heard: (u64, u64), objects: BTreeSet<Object>) {
        let all = |get: fn(&Row) -> u64| rows.iter().map(get).collect::<Vec<_>>();
        self.agents.push(Usage {
            memory: Measured::of(&all(|row| row.anonymous)),
            descriptors: Measured::of(&all(|row| row.descriptors)),
            reloads: last.reloads,
            refused: last.refused,
            failed_scrapes: last.failed_scrapes,
        });
        self.told += last.told;
        self.suppressed += last.suppressed;
        self.heard = (self.heard.0 + heard.0, self.heard.1 + heard.1);
        (self.untold, self.counted, self.denied) = (last.untold, last.counted, last.denied);
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
                "{} packets denied, {} arrived of pods that were never exempt",
                self.denied, self.strangers
            ),
        )];
        for (number, agent) in (1..).zip(&self.agents) {
            let Usage { memory, descriptors, reloads, refused, failed_scrapes } = agent;
            checks.extend([
                (memory.is_steady(MEMORY), format!("agent {number}: {memory} KiB of memory that is no file's")),
                (descriptors.is_steady(DESCRIPTORS), format!("agent {number}: {descriptors} descriptors")),
                (
                    *reloads > 0 && *refused > 0 && *failed_scrapes == 0,
                    format!(
                        "agent {number}: {reloads} configurations loaded, {refused} refused, {failed_scrapes} reads of \
                         metrics failed"
                    ),
                ),
            ]);
        }
        let explained = self.told + self.suppressed + self.untold;
        checks.push((
            explained == self.counted,
            format!(
                "{} packets and calls counted = {} told + {} suppressed + {} yet untold",
                self.counted, self.told, self.suppressed, self.untold
            ),
        ));
        checks.push((
            self.heard == (self.told, self.suppressed),
            format!("followers heard {} and of {} more", self.heard.0, self.heard.1),
        ));
        let is_held_steady = self.held_at_rest.windows(2).all(|pair| pair[0] == pair[1]);
        checks.push((is_held_steady, format!("in the kernel at rest: {:?}", self.held_at_rest)));
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
            "in brackets: the median of the last third of an agent's time less that of the third before\n\
             (at most {MEMORY} KiB and {DESCRIPTORS} descriptors)"
        )?;
        for (is_good, what) in self.checks() {
            writeln!(f, "{} {what}", if is_good { "ok  " } else { "FAIL" })?;
        }
        write!(f, "{}", if self.is_good() { "the agent held" } else { "the agent did NOT hold" })
    }
}
