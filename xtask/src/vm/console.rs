//! Parser of a virtual machine's console.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use imds_tests::{SKIPPED, WHOLE_TEST};
use serde::Serialize;

/// Information from the console of one machine.
#[derive(Debug, Default)]
pub(super) struct Guest {
    /// The run has a filter and does not determine the kernel features that the agent uses.
    pub(super) is_brief: bool,
    pub(super) release: Option<String>,
    /// Features that the agent uses on this kernel, by the names of guest.sh.
    pub(super) took: BTreeMap<String, String>,
    pub(super) executables: BTreeMap<String, Executable>,
    pub(super) complaints: Vec<String>,
    /// Result of init, `None` if it did not reach its end.
    pub(super) result: Option<bool>,
    pub(super) lines: Vec<String>,
}

/// Results of one test executable.
#[derive(Debug, Default, Serialize)]
pub(super) struct Executable {
    pub(super) passed: BTreeSet<String>,
    pub(super) failed: BTreeSet<String>,
    pub(super) ignored: usize,
    /// Tests that were skipped as a whole, with their reasons.
    pub(super) skipped: BTreeMap<String, String>,
    /// Tests that were skipped in part, with their reasons.
    pub(super) in_part: BTreeMap<String, String>,
    pub(super) code: Option<i32>,
    /// Duration by the machine's own clock.
    pub(super) seconds: Option<u64>,
    #[serde(skip)]
    pub(super) output: BTreeMap<String, Vec<String>>,
}

impl Guest {
    /// Parses the console output of guest.sh.
    pub(super) fn from_console(console: &str) -> Self {
        let mut guest = Self::default();
        let (mut executable, mut shown_test) = (Executable::default(), None);
        for line in console.lines().map(str::trim_end) {
            let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
            match word {
                "@kernel" => guest.release = Some(rest.to_owned()),
                "@took" => guest.took.extend(pair(rest)),
                "@brief" => guest.is_brief = true,
                "@complaint" => guest.complaints.push(rest.to_owned()),
                "@begin" => (executable, shown_test) = (Executable::default(), None),
                "@end" => {
                    let mut words = rest.split(' ');
                    let name = words.next().unwrap_or_default().to_owned();
                    executable.code = words.next().and_then(|code| code.parse().ok());
                    executable.seconds = words.next().and_then(|seconds| seconds.parse().ok());
                    guest.executables.insert(name, std::mem::take(&mut executable));
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

/// Parses `NAME: VALUE` into its parts.
fn pair(text: &str) -> Option<(String, String)> {
    text.split_once(": ").map(|(what, how)| (what.to_owned(), how.to_owned()))
}

impl Executable {
    /// Parses a line of libtest. `shown_test` is the test whose output is printed at this point.
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

    /// Returns the number of passed tests, without those that were skipped as a whole.
    pub(super) fn passed(&self) -> usize {
        self.passed.iter().filter(|test| !self.skipped.contains_key(*test)).count()
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
