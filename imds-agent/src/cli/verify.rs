//! `imds-agent verify`.

use std::process::ExitCode;

use super::{Failure, report::ReportArgs};
use crate::{
    node::netlink::Netlink,
    preflight,
    verify::{self, Report},
};

pub(super) async fn verify(args: ReportArgs) -> Result<ExitCode, Failure> {
    preflight::check_capabilities()?;
    preflight::lift_limits()?;
    let report = verify::verify(&args.pins()?, &Netlink::connect()?).await?;
    args.print(&report, Report::table, report.held)
}
