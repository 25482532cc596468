//! Output of the commands that print a report and return the result of their check as the exit code.

use std::{
    io::{self, Write as _},
    process::ExitCode,
};

use anyhow::ensure;
use clap::{Args, ValueEnum};
use serde::Serialize;

use super::{EXIT_CHECK_FAILED, Failure, PinDirArg};
use crate::{
    datapath::{
        object,
        pin::{
            dir::{PinDir, PinError},
            lock::{self, UNPINNED, UNPINNED_REMEDY},
        },
    },
    escape::{escape_lines, to_json_pretty},
};

#[derive(Args, Debug)]
pub(super) struct OutputArgs {
    /// Output format
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
    #[command(flatten)]
    pub(super) pins: PinDirArg,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Output {
    /// Text in columns
    Table,
    /// One JSON object. Versions with the same `schema` only add fields
    Json,
}

impl OutputArgs {
    /// Returns the pin directory of the option `--pin-dir`.
    pub(super) fn pins(&self) -> Result<PinDir, PinError> {
        PinDir::new(&self.pins.pin_dir)
    }

    /// Prints `report` as JSON or, converted by `table`, as text. The exit code is [`EXIT_CHECK_FAILED`] unless `is_right`.
    pub(super) fn print<R: Serialize>(
        &self,
        report: &R,
        table: impl FnOnce(&R) -> String,
        is_right: bool,
    ) -> Result<ExitCode, Failure> {
        match self.output {
            Output::Table => write_stdout(&*escape_lines(&table(report)))?,
            Output::Json => write_stdout(to_json_pretty(report)? + "\n")?,
        }
        Ok(if is_right { ExitCode::SUCCESS } else { ExitCode::from(EXIT_CHECK_FAILED) })
    }
}

/// Fails if no agent has pinned maps at `pins`. `consequence` completes the error message.
pub(super) fn ensure_loaded(pins: &PinDir, consequence: &str) -> anyhow::Result<()> {
    ensure_pinned(pins)?;
    ensure!(object::is_loaded(pins), "nothing is loaded at {}: {consequence}", pins.root().display());
    Ok(())
}

/// Fails if an agent runs without pins, so that no other process can read its maps.
pub(super) fn ensure_pinned(pins: &PinDir) -> anyhow::Result<()> {
    let is_unpinned = !object::is_loaded(pins) && lock::unpinned_agent()?.is_some();
    ensure!(!is_unpinned, "{UNPINNED}; {UNPINNED_REMEDY}");
    Ok(())
}

/// Writes to standard output. A reader like `head` that closes the pipe is not an error.
pub(super) fn write_stdout(text: impl AsRef<[u8]>) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_ref()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written,
    }
}
