//! `imds-agent verify`.

use std::process::ExitCode;

use clap::{Args, ValueEnum};

use super::{Failure, NOT_HELD, PinDirArg};
use crate::{datapath::pins::PinDir, node::netlink::Netlink, preflight, verify};

#[derive(Args, Debug)]
pub(super) struct VerifyArgs {
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

pub(super) async fn verify(args: VerifyArgs) -> Result<ExitCode, Failure> {
    preflight::check_capabilities()?;
    preflight::lift_limits()?;
    let pins = PinDir::new(&args.pins.pin_dir)?;
    let report = verify::verify(&pins, &Netlink::connect()?).await?;
    match args.output {
        Output::Table => print!("{}", report.table()),
        Output::Json => println!("{}", serde_json::to_string_pretty(&report)?),
    }
    Ok(if report.held { ExitCode::SUCCESS } else { ExitCode::from(NOT_HELD) })
}
