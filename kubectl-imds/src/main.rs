//! Entry point of the `kubectl-imds` binary, which kubectl runs as `kubectl imds`.

use std::process::ExitCode;

use clap::Parser as _;
use kubectl_imds::cli::{self, Cli};

fn main() -> ExitCode {
    cli::main(Cli::parse())
}
