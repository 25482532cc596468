//! `imds-agent doctor`.

use std::process::ExitCode;

use clap::{Args, ValueEnum};

use super::{Failure, NOT_HELD, PinDirArg};
use crate::{datapath::pins::PinDir, doctor, node::netlink::Netlink};

#[derive(Args, Debug)]
pub(super) struct DoctorArgs {
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

pub(super) async fn doctor(args: DoctorArgs) -> Result<ExitCode, Failure> {
    let pins = PinDir::new(&args.pins.pin_dir)?;
    let report = doctor::examine(&pins, &Netlink::connect()?).await?;
    match args.output {
        Output::Table => print!("{}", report.table()),
        Output::Json => println!("{}", serde_json::to_string_pretty(&report)?),
    }
    Ok(if report.ready { ExitCode::SUCCESS } else { ExitCode::from(NOT_HELD) })
}
