//! Entry point of the `imds-agent` binary.
#![cfg_attr(
    not(test),
    deny(
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::string_slice,
        clippy::todo,
        clippy::unimplemented,
        clippy::unreachable,
        clippy::unwrap_used
    )
)]

use std::process::ExitCode;

use clap::Parser as _;
use imds_agent::cli::{self, Cli};

fn main() -> ExitCode {
    cli::main(Cli::parse())
}
