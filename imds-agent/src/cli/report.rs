//! `imds-agent report`: prints the recorded denials and requests, and suggested rules.

use std::process::ExitCode;

use clap::Args;
use imds_ebpf_common::{Hook, Role};

use super::{
    Failure,
    output::{OutputArgs, write_stdout},
};
use crate::{
    config::Hooks,
    datapath::{
        maps::{denial_records::Denials, endpoint_maps, interface_records, request_log::RequestLog},
        object,
    },
    encode::field_text,
    escape::escape_lines,
    node::{
        netlink::Netlink,
        netns::{self, OwnNetns},
    },
    telemetry::{Collector, denial_report::DenialReport, request_report::ReportedRequest},
};

#[derive(Args, Debug)]
pub(super) struct ReportArgs {
    /// Print only the rules that would exempt the denied senders or allow the reported requests, in the syntax of the configuration file
    #[arg(long, conflicts_with = "output")]
    rules: bool,
    /// Clear the recorded denials and requests after printing them
    #[arg(long)]
    reset: bool,
    #[command(flatten)]
    output: OutputArgs,
}

pub(super) async fn report(args: &ReportArgs) -> Result<ExitCode, Failure> {
    let pins = args.output.pins.loaded("no denials are recorded")?;
    // Without a running agent, no process has read these events yet.
    if let Some(mut collector) = Collector::open(&pins)? {
        collector.collect()?;
        while collector.has_more() {
            collector.collect()?;
        }
    }
    let mut denials = Denials::open(&pins)?;
    let denied = denials.iter().collect::<Result<Vec<_>, _>>()?;
    let maps = object::Maps::open(&pins)?;
    let endpoints = endpoint_maps::read(&maps)?;
    let mut pods = interface_records::names(&maps, Role::Pod)?;
    // A veth ends with its pod. The name of a tap device belongs to one virtual machine.
    for pair in Netlink::connect()?.links().await?.iter().filter(|link| link.is_pair()) {
        pods.remove(&pair.name);
    }
    let mut log = RequestLog::open(&pins)?;
    let counts = log.iter().flat_map(RequestLog::counts).collect::<Result<Vec<_>, _>>()?;
    let requests = ReportedRequest::from_counts(&counts, &endpoints);
    let provider = field_text(&maps.provider.get(&0, 0)?.effective);
    let applies_lists = matches!(netns::identity()?, Some(OwnNetns::Cookie(_)))
        && Hooks::from_bits(maps.policy.get(&0, 0)?.hooks).contains(Hook::Socket);
    let report = DenialReport::new(pins.root().to_owned(), &denied, &endpoints, &pods).with_requests(
        requests,
        applies_lists.then_some(&*provider),
        &pods,
    );
    let printed = if args.rules {
        write_stdout(&*escape_lines(&report.rules))?;
        Ok(ExitCode::SUCCESS)
    } else {
        args.output.print(&report, DenialReport::table, true)
    };
    if args.reset {
        denials.clear()?;
        if let Some(log) = &mut log {
            log.clear_counts()?;
        }
    }
    printed
}
