//! Results of all machines as a table and as JSON.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::{self, Write as _},
    iter,
    time::Duration,
};

use serde_json::{Value, json};

use super::{
    console::{Executable, Guest},
    kernels::Line,
    qemu_machine::MachineEnd,
};

/// Number of lines that are shown of a failed test's output, and of a console that ends unexpectedly.
const TAIL: usize = 20;

/// Results of the tests on one kernel.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) line: Line,
    guest: Guest,
    duration: Duration,
    /// Failures, each with its output.
    pub(super) complaints: Vec<String>,
}

impl Row {
    /// Checks the results of a machine that should have run the executables `expected`.
    pub(super) fn new<'a>(
        line: Line,
        guest: Guest,
        expected: impl Iterator<Item = &'a str>,
        end: MachineEnd,
        duration: Duration,
    ) -> Self {
        let mut complaints = guest.complaints.clone();
        if guest.result == Some(false) && guest.executables.is_empty() {
            return Self { line, guest, duration, complaints };
        }
        for (what, expected_mode) in line.takes() {
            let took = guest.took.get(what).map_or("nothing", String::as_str);
            if took != expected_mode && !guest.is_brief {
                complaints.push(format!("{what}: the agent uses {took}, expected {expected_mode}"));
            }
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
            complaints.push(with_tail(&format!("the machine {end}; end of its console:"), &guest.lines));
        } else if guest.result == Some(false) && complaints.is_empty() {
            complaints.push("init reported a failure".to_owned());
        }
        Self { line, guest, duration, complaints }
    }

    /// Creates the row of a kernel that failed to start.
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
        if !line.may_skip() {
            // Support for a device also depends on this machine's `ip`, and the machines contain few programs.
            let is_of_kernel =
                |reason: &str| !reason.contains(" devices ") && !reason.starts_with("there is no ");
            let faults = self.skipped.iter().filter(|(_, reason)| is_of_kernel(reason));
            complaints.extend(faults.map(|(test, reason)| format!("{name}: {test} was skipped: {reason}")));
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
            complaints => write!(f, "; {complaints} failures"),
        }
    }
}

/// Appends the last lines of an output to a failure.
fn with_tail(complaint: &str, lines: &[String]) -> String {
    let tail = &lines[lines.len().saturating_sub(TAIL)..];
    iter::once(complaint).chain(tail.iter().map(String::as_str)).collect::<Vec<_>>().join("\n    ")
}

/// Formats the results: a column per kernel, the reasons of skipped tests, and the failures.
pub(super) fn table(rows: &[Row]) -> String {
    let executables: BTreeSet<_> = rows.iter().flat_map(|row| row.guest.executables.keys()).collect();
    let unknown = || "?".to_owned();
    let line = |head: &str, cell: &dyn Fn(&Row) -> String| {
        iter::once(head.to_owned()).chain(rows.iter().map(cell)).collect::<Vec<_>>()
    };
    let mut lines =
        vec![line("KERNEL", &|row| row.guest.release.clone().unwrap_or_else(|| row.line.to_string()))];
    let took: BTreeSet<_> = rows.iter().flat_map(|row| row.guest.took.keys()).collect();
    lines.extend(
        took.into_iter()
            .map(|what| line(what, &|row| row.guest.took.get(what).cloned().unwrap_or_else(unknown))),
    );
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
    for (reason, LeftOut { whole, in_part }) in left_out(rows) {
        let _ = writeln!(text, "\nskipped, {reason}:");
        for (test, lines) in whole {
            let _ = writeln!(text, "    {test} ({})", lines.join(", "));
        }
        if !in_part.is_empty() {
            let _ = writeln!(text, "    parts of {} tests", in_part.len());
        }
    }
    for row in rows {
        for complaint in &row.complaints {
            let _ = writeln!(text, "\nkernel {}: {complaint}", row.line);
        }
    }
    text
}

/// Returns the results as JSON.
pub(super) fn json(rows: &[Row]) -> Value {
    let kernels: Vec<_> = rows
        .iter()
        .map(|row| {
            json!({
                "kernel": row.line.to_string(),
                "release": row.guest.release,
                "took": row.guest.took,
                "tests": row.guest.executables,
                "seconds": row.duration.as_secs(),
                "complaints": row.complaints,
            })
        })
        .collect();
    json!({ "schema": 1, "kernels": kernels })
}

/// Tests that were skipped for one reason.
#[derive(Debug, Default)]
struct LeftOut {
    /// Tests that were skipped as a whole, with their kernels.
    whole: BTreeMap<String, Vec<String>>,
    in_part: BTreeSet<String>,
}

/// Groups skipped tests by reason.
fn left_out(rows: &[Row]) -> BTreeMap<&str, LeftOut> {
    let mut all: BTreeMap<&str, LeftOut> = BTreeMap::new();
    for row in rows {
        for (name, executable) in &row.guest.executables {
            for (test, reason) in &executable.skipped {
                let whole = &mut all.entry(reason).or_default().whole;
                whole.entry(format!("{name}: {test}")).or_default().push(row.line.to_string());
            }
            for (test, reason) in &executable.in_part {
                all.entry(reason).or_default().in_part.insert(format!("{name}: {test}"));
            }
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: &str =
        "SeaBIOS\r\n@kernel 5.10.0\r\n@took attach_mode: clsact\r\n@took node: initial namespace\r
@took node_egress: ifindex\r\n@took events: ringbuf\r\n";
    /// Start of a console with a newer kernel.
    const START_6_1: &str = "@kernel 6.1.0\r\n@took attach_mode: clsact\r\n@took node: cookie\r
@took node_egress: ifindex\r\n@took events: ringbuf\r\n";
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
        Row::new(line, guest, expected.iter().copied(), MachineEnd::ByItself, Duration::from_mins(1))
    }

    #[test]
    fn kernel_skips_are_no_failure() {
        let console = [START, UNLOAD, "TEST-RC=0\r\n"].concat();
        let good = row(Line::V5_10, &console, &["unload"]);
        assert_eq!(good.complaints, [""; 0]);
        assert_eq!(good.to_string(), "1 passed, 1 skipped, 0 failed in 60 s");
        let table = table(&[good]);
        let start = "KERNEL       5.10.0\nattach_mode  clsact\nevents       ringbuf\nnode         initial namespace\n\
             node_egress  ifindex\nunload       1 passed, 1 skipped, 1 ignored\nseconds      60\n";
        assert!(table.starts_with(start), "{table}");
        assert!(
            table.ends_with(
                "\nskipped, no TCX on this kernel:\n    unload: tcx_alone (5.10)\n    parts of 1 tests\n"
            ),
            "{table}"
        );
    }

    #[test]
    fn kernel_with_tcx_must_use_it() {
        let console = [START, UNLOAD, "TEST-RC=0\r\n"].concat();
        let complaints = row(Line::V7, &console, &["unload"]).complaints;
        assert_eq!(
            complaints,
            [
                "attach_mode: the agent uses clsact, expected tcx",
                "node: the agent uses initial namespace, expected cookie",
                "node_egress: the agent uses ifindex, expected cookie",
                "unload: tcx_alone was skipped: no TCX on this kernel"
            ]
        );
    }

    #[test]
    fn failed_start_hides_other_failures() {
        let console = "@kernel 6.1.0\r\n@complaint failed to start the agent: no\r\nTEST-RC=1\r\n";
        assert_eq!(row(Line::V6_1, console, &["follow"]).complaints, ["failed to start the agent: no"]);
    }

    #[test]
    fn failed_test_shows_its_output() {
        let console = [START_6_1, FAILING, "@complaint the kernel says: BUG\r\nTEST-RC=1\r\n"].concat();
        let complaints = row(Line::V6_1, &console, &["follow"]).complaints;
        assert_eq!(complaints, ["the kernel says: BUG", "follow: bad failed\n    thread 'bad' panicked"]);
    }

    #[test]
    fn machine_without_result_has_failed() {
        let console = [START, UNLOAD, "@begin follow\r\ntest good ... ok\r\nKernel panic\r\n"].concat();
        let complaints = row(Line::V5_10, &console, &["follow", "unload"]).complaints;
        assert_eq!(complaints[0], "follow did not end");
        assert!(complaints[1].starts_with("the machine ended early"), "{complaints:?}");
        assert!(complaints[1].ends_with("\n    Kernel panic"), "{complaints:?}");
        assert_eq!(row(Line::V5_10, "", &[]).complaints.len(), 5);
    }
}
