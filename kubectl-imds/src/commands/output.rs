//! Output of the subcommands: tables and JSON on standard output, limitations on standard error.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    io::{self, Write as _},
    process::ExitCode,
};

use anyhow::Result;
use clap::ValueEnum;
use comfy_table::{Table, presets::NOTHING};
use serde::Serialize;

use crate::{
    escape::{escape, to_json_pretty},
    fleet::NodeError,
};

/// Exit code if a node is degraded, differs or gave no answer.
pub(crate) const EXIT_CHECK_FAILED: u8 = 3;
/// Schema version of the JSON output. Removed and changed fields increase it.
pub(crate) const SCHEMA: u32 = 1;
/// Nodes that a line of text names. JSON has all of them.
const MAX_NAMES: usize = 5;

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
pub(crate) enum Format {
    /// Text in columns
    #[default]
    Table,
    /// JSON. Versions with the same `schema` only add fields
    Json,
}

/// Returns the exit code of a check.
pub(crate) fn exit_code(is_right: bool) -> ExitCode {
    if is_right { ExitCode::SUCCESS } else { ExitCode::from(EXIT_CHECK_FAILED) }
}

/// Writes to standard output. A reader like `head` that closes the pipe is not an error.
pub(crate) fn write_stdout(text: impl AsRef<[u8]>) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_ref()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written,
    }
}

/// Writes a line to standard error. A closed standard error is not an error.
pub(crate) fn write_stderr(line: &str) {
    let _ = writeln!(io::stderr(), "kubectl-imds: {}", escape(line));
}

/// Prints a report as JSON or as the text that `table` returns, whose cells are escaped.
pub(crate) fn print<R: Serialize>(
    format: Format,
    report: &R,
    limitations: &[String],
    table: impl FnOnce(&R) -> String,
) -> Result<()> {
    match format {
        Format::Json => write_stdout(to_json_pretty(report)? + "\n")?,
        Format::Table => {
            write_stdout(table(report))?;
            for limitation in limitations {
                write_stderr(limitation);
            }
        }
    }
    Ok(())
}

/// Rows of text under titles. Cells are escaped: a newline of a node must not begin a row.
#[derive(Debug)]
pub(crate) struct Columns {
    table: Table,
    is_empty: bool,
}

impl Columns {
    pub(crate) fn new<T: Into<String>>(titles: impl IntoIterator<Item = T>) -> Self {
        let mut table = Table::new();
        table.load_style(NOTHING);
        table.set_header(titles.into_iter().map(Into::<String>::into));
        Self { table, is_empty: true }
    }

    pub(crate) fn add<C: AsRef<str>>(&mut self, cells: impl IntoIterator<Item = C>) {
        self.is_empty = false;
        self.table.add_row(cells.into_iter().map(|cell| escape(cell.as_ref()).into_owned()));
    }

    /// Returns the table with a newline at its end; empty without rows.
    pub(crate) fn finish(&self) -> String {
        if self.is_empty { String::new() } else { format!("{}\n", self.table.trim_fmt()) }
    }
}

/// Returns the list of nodes without an answer, by error.
pub(crate) fn errors_text(errors: &[NodeError]) -> String {
    if errors.is_empty() {
        return String::new();
    }
    let mut by_error = BTreeMap::<&str, Vec<&str>>::new();
    for NodeError { node, error, .. } in errors {
        by_error.entry(error).or_default().push(node);
    }
    let mut text = "\nwithout an answer:\n".to_owned();
    for (error, nodes) in by_error {
        // Writing to a string does not fail.
        let _ok = writeln!(text, "  {}: {}", escape(&names(&nodes)), escape(error));
    }
    text
}

/// Returns the first names of a list, and the number of the others.
pub(crate) fn names<N: AsRef<str>>(names: &[N]) -> String {
    let shown: Vec<_> = names.iter().take(MAX_NAMES).map(AsRef::as_ref).collect();
    match names.len().saturating_sub(shown.len()) {
        0 => shown.join(", "),
        others => format!("{} and {others} more", shown.join(", ")),
    }
}

/// Returns a number with its noun.
pub(crate) fn count(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_are_escaped() {
        let mut columns = Columns::new(["A", "B"]);
        assert_eq!(columns.finish(), "");
        columns.add(["one\ntwo", "\x1b[2J"]);
        assert_eq!(columns.finish().lines().count(), 2);
        assert!(columns.finish().contains(r"one\ntwo  \u{1b}[2J"), "{}", columns.finish());
    }

    #[test]
    fn equal_errors_are_one_line() {
        let error = |node: usize| NodeError {
            node: format!("n{node}"),
            pod: None,
            error: if node == 0 { "a".to_owned() } else { "b".to_owned() },
        };
        let errors: Vec<_> = (0..8).map(error).collect();
        let expected = "\nwithout an answer:\n  n0: a\n  n1, n2, n3, n4, n5 and 2 more: b\n";
        assert_eq!(errors_text(&errors), expected);
    }
}
