//! `imds-agent doctor`: prints the report of [`crate::diagnose::doctor`].

use std::process::ExitCode;

use super::{Failure, output::OutputArgs};
use crate::{
    diagnose::doctor::{self, DoctorReport},
    node::netlink::Netlink,
};

pub(super) async fn doctor(args: OutputArgs) -> Result<ExitCode, Failure> {
    let report = doctor::run_checks(&args.pins()?, &Netlink::connect()?).await?;
    args.print(&report, DoctorReport::table, report.ready)
}
