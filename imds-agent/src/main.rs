//! The imds-agent binary.
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
    let cli = Cli::parse();
    env_logger::Builder::new()
        // What it calls an error is told in the agent's own words.
        .filter_module("kube_client", log::LevelFilter::Off)
        .parse_env(env_logger::Env::default().default_filter_or("info"))
        .format_target(false)
        .init();
    cli::main(cli)
}
