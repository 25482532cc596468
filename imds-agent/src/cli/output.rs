//! Commands that print a report and say by their exit status whether all is as it should be.

use std::{
    io::{self, Write as _},
    process::ExitCode,
};

use clap::{Args, ValueEnum};
use serde::Serialize;

use super::{Failure, NOT_HELD, PinDirArg};
use crate::{
    datapath::pins::{PinDir, PinError},
    escape::{escape_lines, to_json_pretty},
};

#[derive(Args, Debug)]
pub(super) struct OutputArgs {
    /// For people or for programs
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
    #[command(flatten)]
    pins: PinDirArg,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Output {
    /// A table
    Table,
    /// One JSON object; within one value of its `schema`, fields are only added
    Json,
}

impl OutputArgs {
    /// The pin directory that it is about.
    pub(super) fn pins(&self) -> Result<PinDir, PinError> {
        PinDir::new(&self.pins.pin_dir)
    }

    /// Prints `report`, whose form for people is `table`. `is_right` is what the command was asked.
    pub(super) fn print<R: Serialize>(
        &self,
        report: &R,
        table: impl FnOnce(&R) -> String,
        is_right: bool,
    ) -> Result<ExitCode, Failure> {
        match self.output {
            Output::Table => write_stdout(&escape_lines(&table(report)))?,
            Output::Json => write_stdout(&(to_json_pretty(report)? + "\n"))?,
        }
        Ok(if is_right { ExitCode::SUCCESS } else { ExitCode::from(NOT_HELD) })
    }
}

/// Writes to standard output. A reader that has read enough, like `head`, is no error.
pub(super) fn write_stdout(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written,
    }
}
