//! Commands that print a report and say by their exit status whether all is as it should be.

use std::process::ExitCode;

use clap::{Args, ValueEnum};
use serde::Serialize;

use super::{Failure, NOT_HELD, PinDirArg};
use crate::datapath::pins::{PinDir, PinError};

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
            Output::Table => print!("{}", table(report)),
            Output::Json => println!("{}", serde_json::to_string_pretty(report)?),
        }
        Ok(if is_right { ExitCode::SUCCESS } else { ExitCode::from(NOT_HELD) })
    }
}
