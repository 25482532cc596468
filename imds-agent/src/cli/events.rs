//! `imds-agent events`.

use std::{
    io::{self, Write as _},
    process::ExitCode,
};

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use imds_ebpf_common::Event;

use super::{Failure, PinDirArg};
use crate::{
    datapath::{home, object, pins::PinDir, pods},
    events::{self, Record, boot_time},
    follower::Follower,
    node::links,
    preflight,
};

#[derive(Args, Debug)]
pub(super) struct EventsArgs {
    /// For people or for programs
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    output: Output,
    #[command(flatten)]
    pins: PinDirArg,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Output {
    /// One line for each
    Text,
    /// One JSON object a line; fields are only added
    Json,
}

pub(super) fn events(args: &EventsArgs) -> Result<ExitCode, Failure> {
    preflight::check_capabilities()?;
    let pins = PinDir::new(&args.pins.pin_dir)?;
    if !object::is_loaded(&pins) {
        return Err(
            anyhow::anyhow!("nothing is loaded at {}: there are no events", pins.root().display()).into()
        );
    }
    home::ensure_ours(&pins)?;
    // A ring buffer has one reading position: two readers would each miss what the other takes.
    let names = pods::Names::open(&pins)?;
    let mut follower = Follower::open(pins)?;
    loop {
        let events = follower.read()?;
        if follower.missed() > 0 {
            log::warn!("{} events came faster than they were read", follower.missed());
        }
        match print(&events, &names, args.output) {
            Ok(()) => {}
            // Whoever read them has had enough, as `head` does.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(ExitCode::SUCCESS),
            Err(error) => return Err(anyhow::Error::from(error).context("can't print events").into()),
        }
        follower.wait().context("can't wait for events")?;
    }
}

fn print(events: &[Event], names: &pods::Names, output: Output) -> io::Result<()> {
    let mut out = io::stdout().lock();
    let booted = boot_time();
    for event in events {
        let pod = events::senders(event).find_map(|sender| names.get(sender));
        let record = Record::new(event, booted, links::name_of, pod);
        match output {
            Output::Text => writeln!(out, "{record}")?,
            Output::Json => writeln!(out, "{}", serde_json::to_string(&record)?)?,
        }
    }
    out.flush()
}
