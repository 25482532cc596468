//! `imds-agent verify`: prints the report of [`crate::diagnose::verify`].

use std::process::ExitCode;

use super::{
    Failure,
    output::{OutputArgs, ensure_pinned},
};
use crate::{
    diagnose::{
        preflight,
        verify::{self, VerifyReport},
    },
    node::netlink::Netlink,
};

pub(super) async fn verify(args: OutputArgs) -> Result<ExitCode, Failure> {
    preflight::check_capabilities()?;
    preflight::lift_limits()?;
    let pins = args.pins()?;
    ensure_pinned(&pins)?;
    let report = verify::verify(&pins, &Netlink::connect()?).await?;
    args.print(&report, VerifyReport::table, report.passed)
}
