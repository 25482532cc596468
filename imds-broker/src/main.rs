//! Broker of scoped exemptions and explained denials: serves listeners in the network namespaces of pods without any privilege.
//!
//! The agent starts this program with a socket as its standard input; `imds_broker::protocol` describes the messages. The program has
//! no other input: no arguments, files or environment variables, and ends when the agent closes the socket.

use std::{io, process::ExitCode};

use anyhow::{Context as _, Result};
use tokio::runtime;

mod broker;
mod connection;
mod control;
mod explanation;
mod limits;
mod listener;
mod reports;
mod response;
mod sandbox;
mod seccomp;
mod upstream;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("imds-broker: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    sandbox::enter()?;
    let runtime = runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.context("failed to start the runtime")?;
    runtime.block_on(async {
        let control = control::Control::new(io::stdin())?;
        // Last, because it forbids the calls of all steps before.
        seccomp::forbid_other_calls()?;
        broker::run(control).await
    })
}
