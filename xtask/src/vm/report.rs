//! What a machine's console tells, and how it is shown.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::{self, Write as _},
    iter,
    time::Duration,
};

use imds_tests::{SKIPPED, WHOLE_TEST};
use serde_json::Value;

use super::{kernels::Line, machine::End};

/// How much of a failed test's output is shown, and of a console that ends unexpectedly.
const TAIL: usize = 20;

/// What a console tells.
#[derive(Debug, Default)]
pub(super) struct Guest {
    release: Option<String>,
    /// How the agent guards a pod where it may choose.
    guard: Option<String>,
    executables: BTreeMap<String, Executable>,
    complaints: Vec<String>,
    /// Whether init came to its end, and found no fault.
    result: Option<bool>,
    lines: Vec<String>,
}

/// What one test executable told.
#[derive(Debug, Default)]
struct Executable {
    passed: BTreeSet<String>,
    failed: BTreeSet<String>,
    ignored: usize,
    /// Tests that ran nothing, with their reasons.
    skipped: BTreeMap<String, String>,
    code: Option<i32>,
    output: BTreeMap<String, Vec<String>>,
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
                "@status" => guest.guard = guard(rest),
                "@complaint" => guest.complaints.push(rest.to_owned()),
                "@begin" => (executable, shown_test) = (Executable::default(), None),
                "@end" => {
                    let (name, code) = rest.split_once(' ').unwrap_or((rest, ""));
                    executable.code = code.parse().ok();
                    guest.executables.insert(name.to_owned(), std::mem::take(&mut executable));
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

impl Executable {
    /// Reads a line of libtest's. `shown_test` is the one whose output the line may be of.
    fn read(&mut self, line: &str, shown_test: &mut Option<String>) {
        if let Some(name) = line.strip_prefix("---- ").and_then(|rest| rest.strip_suffix(" stdout ----")) {
            *shown_test = Some(name.to_owned());
        } else if matches!(line, "failures:" | "successes:") || line.starts_with("test result: ") {
            *shown_test = None;
        } else if let Some(name) = shown_test {
            let what = line.strip_prefix(SKIPPED).and_then(|what| what.split_once(": "));
            if let Some((WHOLE_TEST, reason)) = what {
                self.skipped.insert(name.clone(), reason.to_owned());
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
    fn passed(&self) -> usize {
        self.passed.iter().filter(|test| !self.skipped.contains_key(*test)).count()
    }

    fn is_empty(&self) -> bool {
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

/// What is wrong, and the last of the lines that tell more.
fn with_tail(complaint: &str, lines: &[String]) -> String {
    let tail = &lines[lines.len().saturating_sub(TAIL)..];
    iter::once(complaint).chain(tail.iter().map(String::as_str)).collect::<Vec<_>>().join("\n    ")
}

/// How `imds-agent status -o json` says that a pod's interface is guarded.
fn guard(status: &str) -> Option<String> {
    let status: Value = serde_json::from_str(status).ok()?;
    let pod = status["interfaces"].as_array()?.iter().find(|interface| interface["role"] == "pod")?;
    Some(pod["guard"].as_str()?.to_owned())
}

/// A kernel, and all that is wrong there.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) line: Line,
    guest: Guest,
    duration: Duration,
    /// One each, and what belongs to it.
    pub(super) complaints: Vec<String>,
}

impl Row {
    /// Judges a machine that was given the executables `expected`.
    pub(super) fn new<'a>(
        line: Line,
        guest: Guest,
        expected: impl Iterator<Item = &'a str>,
        end: End,
        duration: Duration,
    ) -> Self {
        let mut complaints = guest.complaints.clone();
        if guest.guard.as_deref() != Some(line.guard()) {
            let guard = guest.guard.as_deref().unwrap_or("nothing");
            complaints.push(format!("the agent chooses {guard}, not {}", line.guard()));
        }
        for name in expected {
            match guest.executables.get(name) {
                None => complaints.push(format!("{name} did not end")),
                Some(executable) => complaints.extend(executable.complaints(name, line)),
            }
        }
        if complaints.is_empty() && guest.executables.values().all(Executable::is_empty) {
            complaints.push("no test ran".to_owned());
        }
        if guest.result.is_none() {
            complaints.push(with_tail(&format!("the machine {end}; its last words:"), &guest.lines));
        } else if guest.result == Some(false) && complaints.is_empty() {
            complaints.push("init found a fault".to_owned());
        }
        Self { line, guest, duration, complaints }
    }

    /// A kernel that could not even be started.
    pub(super) fn failed(line: Line, error: String) -> Self {
        Self { line, guest: Guest::default(), duration: Duration::ZERO, complaints: vec![error] }
    }

    fn cell(&self, executable: &str) -> String {
        self.guest.executables.get(executable).map_or_else(|| "missing".to_owned(), ToString::to_string)
    }
}

impl Executable {
    fn complaints(&self, name: &str, line: Line) -> Vec<String> {
        let failures = self.failed.iter().map(|test| {
            let output = self.output.get(test).map(Vec::as_slice).unwrap_or_default();
            with_tail(&format!("{name}: {test} failed"), output)
        });
        let mut complaints: Vec<_> = failures.collect();
        if self.code != Some(0) && complaints.is_empty() {
            complaints.push(format!("{name} ended with {:?}", self.code));
        }
        // The only reason there is.
        if line.guard() == "tcx" {
            complaints.extend(
                self.skipped.iter().map(|(test, reason)| format!("{name}: {test} was skipped: {reason}")),
            );
        }
        complaints
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sum = |count: fn(&Executable) -> usize| self.guest.executables.values().map(count).sum::<usize>();
        let [passed, skipped, failed] = [
            sum(Executable::passed),
            sum(|executable| executable.skipped.len()),
            sum(|executable| executable.failed.len()),
        ];
        let seconds = self.duration.as_secs();
        write!(f, "{passed} passed, {skipped} skipped, {failed} failed in {seconds} s")?;
        match self.complaints.len() {
            0 => Ok(()),
            complaints => write!(f, "; {complaints} complaints"),
        }
    }
}

/// All kernels beside each other, why tests were skipped, and what is wrong.
pub(super) fn table(rows: &[Row]) -> String {
    let executables: BTreeSet<_> = rows.iter().flat_map(|row| row.guest.executables.keys()).collect();
    let unknown = || "?".to_owned();
    let line = |head: &str, cell: &dyn Fn(&Row) -> String| {
        iter::once(head.to_owned()).chain(rows.iter().map(cell)).collect::<Vec<_>>()
    };
    let mut lines = vec![
        line("KERNEL", &|row| row.guest.release.clone().unwrap_or_else(|| row.line.to_string())),
        line("guard", &|row| row.guest.guard.clone().unwrap_or_else(unknown)),
    ];
    lines.extend(executables.into_iter().map(|executable| line(executable, &|row| row.cell(executable))));
    lines.push(line("seconds", &|row| row.duration.as_secs().to_string()));

    let widths: Vec<_> = (0..=rows.len())
        .map(|column| lines.iter().map(|line| line[column].len()).max().unwrap_or(0))
        .collect();
    let mut text = String::new();
    for line in lines {
        let cells = line.iter().zip(&widths).map(|(cell, &width)| format!("{cell:width$}"));
        text += cells.collect::<Vec<_>>().join("  ").trim_end();
        text.push('\n');
    }
    for (tests, lines) in skipped(rows) {
        let _ = writeln!(text, "\nskipped on {}:\n    {}", lines.join(", "), tests.join("\n    "));
    }
    for row in rows {
        for complaint in &row.complaints {
            let _ = writeln!(text, "\nkernel {}: {complaint}", row.line);
        }
    }
    text
}

/// The tests that were skipped and why, with the kernels on which it was these.
fn skipped(rows: &[Row]) -> BTreeMap<Vec<String>, Vec<String>> {
    let mut skipped: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for row in rows {
        let tests = row.guest.executables.iter().flat_map(|(name, executable)| {
            executable.skipped.iter().map(move |(test, reason)| format!("{name}: {test}: {reason}"))
        });
        skipped.entry(tests.collect()).or_default().push(row.line.to_string());
    }
    skipped.remove(&Vec::new());
    skipped
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: &str = "SeaBIOS\r\n@kernel 5.10.0\r
@status {\"interfaces\": [{\"role\": \"loopback\"}, {\"role\": \"pod\", \"guard\": \"clsact\"}]}\r
";
    const UNLOAD: &str = "@begin unload\r
running 3 tests\r
test everywhere ... ok\r
test tcx_alone ... ok\r
test slow ... ignored\r
\r
successes:\r
\r
---- everywhere stdout ----\r
skipped: the part with TCX: no TCX on this kernel\r
\r
---- tcx_alone stdout ----\r
skipped: the whole test: no TCX on this kernel\r
\r
successes:\r
    everywhere\r
    tcx_alone\r
\r
test result: ok. 2 passed; 0 failed; 1 ignored\r
@end unload 0\r
";
    const FAILING: &str = "@begin follow\r
test good ... ok\r
test bad ... FAILED\r
failures:\r
---- bad stdout ----\r
thread 'bad' panicked\r
failures:\r
    bad\r
test result: FAILED. 1 passed; 1 failed\r
@end follow 101\r
";

    fn row(line: Line, console: &str, expected: &[&str]) -> Row {
        let guest = Guest::from_console(console);
        Row::new(line, guest, expected.iter().copied(), End::ByItself, Duration::from_mins(1))
    }

    #[test]
    fn what_is_skipped_for_a_reason_that_the_kernel_gives_is_no_fault() {
        let console = [START, UNLOAD, "TEST-RC=0\r\n"].concat();
        let good = row(Line::V5_10, &console, &["unload"]);
        assert_eq!(good.complaints, [""; 0]);
        assert_eq!(good.to_string(), "1 passed, 1 skipped, 0 failed in 60 s");
        let table = table(&[good]);
        let start =
            "KERNEL   5.10.0\nguard    clsact\nunload   1 passed, 1 skipped, 1 ignored\nseconds  60\n";
        assert!(table.starts_with(start), "{table}");
        assert!(
            table.contains("skipped on 5.10:\n    unload: tcx_alone: no TCX on this kernel\n"),
            "{table}"
        );
    }

    #[test]
    fn a_kernel_that_has_tcx_must_use_it() {
        let console = [START, UNLOAD, "TEST-RC=0\r\n"].concat();
        let complaints = row(Line::V7, &console, &["unload"]).complaints;
        assert_eq!(complaints[0], "the agent chooses clsact, not tcx");
        assert_eq!(complaints[1], "unload: tcx_alone was skipped: no TCX on this kernel");
        assert_eq!(complaints.len(), 2);
    }

    #[test]
    fn a_failed_test_is_shown_with_its_output() {
        let console = [START, FAILING, "@complaint the kernel says: BUG\r\nTEST-RC=1\r\n"].concat();
        let complaints = row(Line::V6_1, &console, &["follow"]).complaints;
        assert_eq!(complaints, ["the kernel says: BUG", "follow: bad failed\n    thread 'bad' panicked"]);
    }

    #[test]
    fn a_machine_that_says_nothing_of_its_end_has_failed() {
        let console = [START, UNLOAD, "@begin follow\r\ntest good ... ok\r\nKernel panic\r\n"].concat();
        let complaints = row(Line::V5_10, &console, &["follow", "unload"]).complaints;
        assert_eq!(complaints[0], "follow did not end");
        assert!(complaints[1].starts_with("the machine ended early"), "{complaints:?}");
        assert!(complaints[1].ends_with("\n    Kernel panic"), "{complaints:?}");
        assert_eq!(row(Line::V5_10, "", &[]).complaints.len(), 2);
    }
}
