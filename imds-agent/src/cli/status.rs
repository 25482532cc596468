//! `imds-agent status`: prints the report of [`crate::telemetry::status`].

use std::process::ExitCode;

use super::{Failure, output::OutputArgs};
use crate::{
    diagnose::preflight,
    node::netlink::Netlink,
    telemetry::status::{self, State, StatusReport},
};

pub(super) async fn status(args: OutputArgs) -> Result<ExitCode, Failure> {
    preflight::check_capabilities()?;
    let report = status::gather(&args.pins()?, &Netlink::connect()?).await?;
    let is_enforced = match report.state {
        State::Enforcing | State::Auditing | State::Off => true,
        State::Degraded | State::Unloaded => false,
    };
    args.print(&report, StatusReport::table, is_enforced)
}
