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
        .replace("{{capabilities}}", &facts::capabilities(columns))
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
