//! `imds-agent status`, `doctor` and `verify`: print the reports of [`crate::telemetry::status`] and [`crate::diagnose`].

use std::process::ExitCode;

use super::{
    Failure,
    output::{OutputArgs, ensure_pinned},
};
use crate::{
    diagnose::{
        doctor::{self, DoctorReport},
        preflight,
        verify::{self, VerifyReport},
    },
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

pub(super) async fn doctor(args: OutputArgs) -> Result<ExitCode, Failure> {
    let report = doctor::run_checks(&args.pins()?, &Netlink::connect()?).await?;
    args.print(&report, DoctorReport::table, report.ready)
}

pub(super) async fn verify(args: OutputArgs) -> Result<ExitCode, Failure> {
    preflight::check_capabilities()?;
    preflight::lift_limits()?;
    let pins = args.pins()?;
    ensure_pinned(&pins)?;
    let report = verify::verify(&pins, &Netlink::connect()?).await?;
    args.print(&report, VerifyReport::table, report.passed)
}
