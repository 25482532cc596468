//! `docs/kernels.md`: what each kernel has, and how the tests did there.

mod facts;
mod markdown;
mod tests_told;

use std::{collections::BTreeSet, fs, path::Path, process::ExitCode};

use anyhow::{Context as _, Result};
use clap::ValueEnum as _;

use self::markdown::table;
use super::{
    kernels::Line,
    records::{self, Record},
};
use crate::workspace::{root, say};

const TEMPLATE: &str = include_str!("kernels.md");
const PATH: &str = "docs/kernels.md";
/// Where each test executable has its source.
const TESTS: &str = "tests/tests";

/// A kernel of the document.
#[derive(Debug)]
struct Column {
    line: Line,
    record: Record,
}

impl Column {
    /// What it is called there.
    fn title(&self) -> String {
        match self.line {
            // What comes after the numbers is of who built it.
            Line::This => numbers(&self.record.release).to_owned(),
            Line::V5_10 | Line::V6_1 | Line::V6_12 => self.line.to_string(),
            Line::V7 => self.record.release.split('.').take(2).collect::<Vec<_>>().join("."),
        }
    }

    fn release(&self) -> &str {
        match self.line {
            Line::This => "another's, not emulated",
            Line::V5_10 | Line::V6_1 | Line::V6_12 | Line::V7 => &self.record.release,
        }
    }

    /// Older kernels come first.
    fn version(&self) -> Vec<u32> {
        numbers(&self.record.release).split('.').filter_map(|number| number.parse().ok()).collect()
    }
}

fn numbers(release: &str) -> &str {
    let end = release.find(|character: char| !character.is_ascii_digit() && character != '.');
    release[..end.unwrap_or(release.len())].trim_end_matches('.')
}

/// Writes it, of the consoles in `dir`, and says what they do not tell.
pub(super) fn write(dir: &Path) -> Result<ExitCode> {
    let mut columns = Vec::new();
    for &line in Line::value_variants() {
        match records::read(dir, line)? {
            Some(record) => columns.push(Column { line, record }),
            None => say(format_args!("kernel {line} was never run: `cargo xtask vm --kernel {line}`")),
        }
    }
    columns.sort_by_key(Column::version);
    let executables = executables(&root().join(TESTS))?;
    for column in &columns {
        complain(column, &executables);
    }
    let path = root().join(PATH);
    fs::write(&path, render(&columns, &executables)).with_context(|| format!("could not write {PATH}"))?;
    say(format_args!("wrote {PATH}"));
    Ok(ExitCode::SUCCESS)
}

/// The test executables that there are now.
fn executables(dir: &Path) -> Result<BTreeSet<String>> {
    let entries = fs::read_dir(dir).with_context(|| format!("could not list {}", dir.display()))?;
    let name = |entry: fs::DirEntry| Some(entry.path().file_stem()?.to_str()?.to_owned());
    Ok(entries.flatten().filter_map(name).collect())
}

/// Says what the document lacks.
fn complain(column: &Column, executables: &BTreeSet<String>) {
    let line = column.line;
    let results = &column.record.results;
    let missing: Vec<_> =
        executables.iter().filter(|name| !results.contains_key(*name)).map(String::as_str).collect();
    if !missing.is_empty() {
        let names = missing.join(" ");
        say(format_args!("kernel {line}: not run: `cargo xtask vm --kernel {line} -- {names}`"));
    }
    let commits = tests_told::commits(&column.record);
    if commits.len() > 1 {
        say(format_args!("kernel {line}: results of {} commits", commits.len()));
    }
}

fn render(columns: &[Column], executables: &BTreeSet<String>) -> String {
    TEMPLATE
        .replace("{{capabilities}}", &facts::capabilities(columns, executables))
        .replace("{{takes}}", &facts::takes(columns))
        .replace("{{doctor}}", &facts::doctor(columns))
        .replace("{{results}}", &tests_told::results(columns, executables))
        .replace("{{failed}}", &tests_told::failed(columns))
        .replace("{{skipped}}", &tests_told::skipped(columns))
        .replace("{{commits}}", &tests_told::commits_of(columns))
}

/// A table of which each kernel is a column, after columns of its own.
fn of_kernels(columns: &[Column], heads: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let head = heads.iter().map(|&head| head.to_owned()).chain(columns.iter().map(Column::title));
    table(head.collect(), rows)
}

/// Their names, of as many as there are.
fn names<'a>(columns: impl IntoIterator<Item = &'a Column>) -> String {
    columns.into_iter().map(Column::title).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::{super::console::Guest, *};

    const OLD: &str = r#"@kernel 5.10.0-46-cloud-amd64
@divisor 4
@commit 0123456789abcdef0123
@doctor {"checks":[{"name":"attaching","state":"degraded","found":"clsact filters; no TCX","remedy":"priority 1 | Linux 6.6"},{"name":"btf","state":"ok","found":"/sys","remedy":null}]}
@capability netkit: no (RTNETLINK answers: Operation not supported )
@capability vlan: yes
@took guard: clsact
@begin follow --include-ignored
test good ... ok
test bad ... FAILED
failures:
---- bad stdout ----
thread 'bad' panicked at tests/x.rs:1:1:
nothing arrives
failures:
    bad
@end follow 101 30
@begin unload 
test everywhere ... ok
test tcx_alone ... ok
test open ... ignored, for a reason
successes:
---- everywhere stdout ----
skipped: a part: no ipvlan devices on this kernel (Error: Unknown device type.)
---- tcx_alone stdout ----
skipped: the whole test: no TCX on this kernel
successes:
@end unload 0 12
TEST-RC=1
"#;
    const THIS: &str = r#"@kernel 6.18.44-whose
@divisor 1
@commit fedcba9876543210-dirty
@doctor {"checks":[{"name":"attaching","state":"ok","found":"TCX; clsact filters too","remedy":null}]}
@begin unload 
test everywhere ... ok
test tcx_alone ... ok
@end unload 0 1
TEST-RC=0
"#;

    #[test]
    fn all_that_consoles_tell_is_there() {
        let columns = [(Line::V5_10, OLD), (Line::This, THIS)].map(|(line, console)| Column {
            line,
            record: Record::of(vec![Guest::from_console(console)]).unwrap(),
        });
        let executables = ["follow", "harness", "unload"].map(str::to_owned).into();
        let text = render(&columns, &executables);
        assert!(!text.contains("{{"), "{text}");
        for line in [
            "| | since | 5.10 | 6.18.44 |",
            "| release | | 5.10.0-46-cloud-amd64 | another's, not emulated |",
            "| TCX | 6.6 | no: clsact | yes |",
            "| **tests** | | 2 passed, 1 skipped, 1 **failed**, 1 of 3 executables not run | 2 passed, 2 of 3 executables not run |",
            "| netkit | 6.7 | no | ? |",
            "| VLAN | 2.4 | yes | ? |",
            "| the agent | 5.10 |",
            "| attaches its programs by | clsact filter |",
            r"| 5.10 | `attaching  degraded  clsact filters; no TCX` | `priority 1 \| Linux 6.6` |",
            "| `follow` | 1, 1 **failed** | not run |",
            "| `harness` | not run | not run |",
            "| `unload` | 1, 1 skipped | 2 |",
            "| seconds | 42 | 1 |",
            "| repetitions | 1/4 | all |",
            "| 5.10 | `follow: bad` | `nothing arrives` |",
            "| no TCX | 5.10 | 1 | clsact filters are taken instead, and tested by the same tests |",
            "| no ipvlan devices | 5.10 | parts of 1 | no pod can have one |",
            "no TCX: `unload: tcx_alone`",
            "| `0123456789ab` | 5.10 |",
            "| `fedcba987654` and changes | 6.18.44 |",
        ] {
            assert!(text.lines().any(|known| known == line), "{line}\n{text}");
        }
    }
}
