//! `imds-agent events`: prints recorded events, and new ones as they occur.

use std::{
    io::{self, Write as _},
    os::fd::AsFd as _,
    process::ExitCode,
};

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use imds_ebpf_common::Event;
use jiff::{SignedDuration, Timestamp};

use super::{Failure, PinDirArg};
use crate::{
    datapath::maps::pod_names,
    escape::{escape, to_json},
    node::link,
    telemetry::{
        event_record::{self, EventRecord, boot_time, wall_time},
        http_request::RequestEvent,
        subscriber::EventSubscriber,
    },
};

#[derive(Args, Debug)]
pub(super) struct EventsArgs {
    /// Output format
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    output: Output,
    /// Print the recorded events and exit
    #[arg(long)]
    no_follow: bool,
    /// Print the recorded events of the last DURATION first (90s, 10m, 1h30m), instead of the unread ones. The last 1,024
    /// events are recorded
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    since: Option<SignedDuration>,
    #[command(flatten)]
    pins: PinDirArg,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Output {
    /// One line per event
    Text,
    /// One JSON object per line; later versions only add fields
    Json,
}

fn parse_duration(text: &str) -> Result<SignedDuration, String> {
    let duration = text.parse::<SignedDuration>().ok().filter(|duration| !duration.is_negative());
    duration.ok_or_else(|| format!("{text:?} is not a duration like 90s, 10m or 1h30m"))
}

pub(super) fn events(args: &EventsArgs) -> Result<ExitCode, Failure> {
    let pins = args.pins.loaded("there are no events")?;
    let names = pod_names::Names::open(&pins)?;
    let earliest = args.since.map(|since| Timestamp::now().checked_sub(since).unwrap_or(Timestamp::MIN));
    let mut subscriber = match earliest {
        Some(_) => EventSubscriber::open_last(pins, u64::MAX)?,
        None => EventSubscriber::open(pins)?,
    };
    loop {
        let mut events = subscriber.read()?;
        let mut requests = subscriber.read_requests()?;
        if let Some(earliest) = earliest {
            let booted = boot_time();
            events.retain(|event| wall_time(event, booted) >= earliest);
            requests.retain(|request| request.time >= earliest);
        }
        if subscriber.missed() > 0 {
            log::warn!(
                "missed {} events: they were overwritten before they could be read",
                subscriber.missed()
            );
        }
        match print(&events, &requests, &names, args.output) {
            Ok(()) => {}
            // A reader like `head` closes the pipe once it has enough, which is not an error.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(ExitCode::SUCCESS),
            Err(error) => return Err(anyhow::Error::from(error).context("failed to print events").into()),
        }
        if args.no_follow {
            if subscriber.has_more() {
                continue;
            }
            return Ok(ExitCode::SUCCESS);
        }
        if !subscriber.wait(io::stdout().as_fd()).context("failed to wait for events")? {
            return Ok(ExitCode::SUCCESS);
        }
    }
}

fn print(
    events: &[Event],
    requests: &[RequestEvent],
    names: &pod_names::Names,
    output: Output,
) -> io::Result<()> {
    let mut out = io::stdout().lock();
    let booted = boot_time();
    let of_event = |event| {
        let pod = event_record::senders(event).find_map(|sender| names.get(sender));
        EventRecord::new(event, booted, link::name_of, pod)
    };
    let of_request = |request: &RequestEvent| {
        let pod = request.sender.subjects().find_map(|sender| names.get(sender));
        EventRecord::of_request(request, link::name_of, pod)
    };
    let mut records: Vec<_> = events.iter().map(of_event).chain(requests.iter().map(of_request)).collect();
    if !requests.is_empty() {
        records.sort_by_key(|record| record.time);
    }
    for record in records {
        match output {
            Output::Text => writeln!(out, "{}", escape(&record.to_string()))?,
            Output::Json => writeln!(out, "{}", to_json(&record)?)?,
        }
    }
    out.flush()
}
