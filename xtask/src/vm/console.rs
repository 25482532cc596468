//! What a machine's console tells.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use imds_tests::{SKIPPED, WHOLE_TEST};
use serde::Serialize;
use serde_json::Value;

/// All that one told.
#[derive(Debug, Default)]
pub(super) struct Guest {
    /// Whether it was given a filter, and so does not look what the agent takes.
    pub(super) is_brief: bool,
    pub(super) release: Option<String>,
    /// What the agent and the tests were built from.
    pub(super) commit: Option<String>,
    /// How many times less was done of the longest tests.
    pub(super) divisor: Option<u32>,
    /// What `doctor` reports.
    pub(super) doctor: Option<Value>,
    /// What else the kernel has or lacks.
    pub(super) capabilities: BTreeMap<String, String>,
    /// What the agent makes use of where it may choose.
    pub(super) took: BTreeMap<String, String>,
    pub(super) executables: BTreeMap<String, Executable>,
    /// What began and did not end.
    pub(super) unfinished: Option<String>,
    /// How the machine ended, where whoever ran it saw that.
    pub(super) end: Option<String>,
    pub(super) complaints: Vec<String>,
    /// Whether init came to its end, and found no fault.
    pub(super) result: Option<bool>,
    pub(super) lines: Vec<String>,
}

/// What one test executable told.
#[derive(Debug, Default, Serialize)]
pub(super) struct Executable {
    /// Whether it was to run all its tests.
    pub(super) is_whole: bool,
    pub(super) passed: BTreeSet<String>,
    pub(super) failed: BTreeSet<String>,
    pub(super) ignored: usize,
    /// Tests that ran nothing, with their reasons.
    pub(super) skipped: BTreeMap<String, String>,
    /// Tests that left out a part, with their reasons.
    pub(super) in_part: BTreeMap<String, String>,
    pub(super) code: Option<i32>,
    /// How long it took by the machine's own clock.
    pub(super) seconds: Option<u64>,
    #[serde(skip)]
    pub(super) output: BTreeMap<String, Vec<String>>,
}

impl Guest {
    /// Reads the console of guest.sh.
    pub(super) fn from_console(console: &str) -> Self {
        let mut guest = Self::default();
        let (mut executable, mut shown_test) = (Executable::default(), None);
        for line in console.lines().map(str::trim_end) {
            let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
            match word {
                "@kernel" => guest.release = Some(rest.to_owned()),
                "@commit" => guest.commit = Some(rest.to_owned()),
                "@divisor" => guest.divisor = rest.parse().ok(),
                "@doctor" => guest.doctor = serde_json::from_str(rest).ok(),
                "@capability" => guest.capabilities.extend(pair(rest)),
                "@took" => guest.took.extend(pair(rest)),
                "@machine" => guest.end = Some(rest.to_owned()),
                "@brief" => guest.is_brief = true,
                "@complaint" => guest.complaints.push(rest.to_owned()),
                "@begin" => {
                    let mut words = rest.split(' ');
                    guest.unfinished = words.next().map(str::to_owned);
                    let is_whole = words.all(|argument| argument.is_empty() || argument.starts_with("--"));
                    (executable, shown_test) = (Executable { is_whole, ..Executable::default() }, None);
                }
                "@end" => {
                    let mut words = rest.split(' ');
                    let name = words.next().unwrap_or_default().to_owned();
                    executable.code = words.next().and_then(|code| code.parse().ok());
                    executable.seconds = words.next().and_then(|seconds| seconds.parse().ok());
                    guest.executables.insert(name, std::mem::take(&mut executable));
                    guest.unfinished = None;
                }
                "TEST-RC=0" => guest.result = Some(true),
                "TEST-RC=1" => guest.result = Some(false),
                _ => executable.read(line, &mut shown_test),
            }
        }
        guest.lines = console.lines().map(|line| line.trim_end().to_owned()).collect();
        guest
    }
}

/// Of `WHAT: HOW`.
fn pair(text: &str) -> Option<(String, String)> {
    text.split_once(": ").map(|(what, how)| (what.to_owned(), how.to_owned()))
}

impl Executable {
    /// Reads a line of libtest's. `shown_test` is the one whose output the line may be of.
    fn read(&mut self, line: &str, shown_test: &mut Option<String>) {
        if let Some(name) = line.strip_prefix("---- ").and_then(|rest| rest.strip_suffix(" stdout ----")) {
            *shown_test = Some(name.to_owned());
        } else if matches!(line, "failures:" | "successes:") || line.starts_with("test result: ") {
            *shown_test = None;
        } else if let Some(name) = shown_test {
            let what = line.strip_prefix(SKIPPED).and_then(|what| what.split_once(": "));
            if let Some((what, reason)) = what {
                let tests = if what == WHOLE_TEST { &mut self.skipped } else { &mut self.in_part };
                tests.insert(name.clone(), reason.to_owned());
            }
            if !line.is_empty() {
                self.output.entry(name.clone()).or_default().push(line.to_owned());
            }
        } else if let Some((name, result)) =
            line.strip_prefix("test ").and_then(|rest| rest.split_once(" ... "))
        {
            match result {
                "ok" => _ = self.passed.insert(name.to_owned()),
                "FAILED" => _ = self.failed.insert(name.to_owned()),
                _ => self.ignored += 1,
            }
        }
    }

    /// How many tests passed that ran something.
    pub(super) fn passed(&self) -> usize {
        self.passed.iter().filter(|test| !self.skipped.contains_key(*test)).count()
    }

    /// How many failed; all in one, where it ended otherwise than by its tests.
    pub(super) fn failures(&self) -> usize {
        self.failed.len().max(usize::from(self.code != Some(0)))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.passed.is_empty() && self.failed.is_empty() && self.ignored == 0
    }
}

impl fmt::Display for Executable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("-");
        }
        write!(f, "{} passed", self.passed())?;
        for (count, what) in
            [(self.skipped.len(), "skipped"), (self.ignored, "ignored"), (self.failed.len(), "FAILED")]
        {
            if count > 0 {
                write!(f, ", {count} {what}")?;
            }
        }
        Ok(())
    }
}
