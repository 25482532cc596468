//! `imds-agent events`.

use std::{
    io::{self, Write as _},
    os::fd::AsFd as _,
    process::ExitCode,
};

use aya::maps::{MapData, RingBuf};
use clap::{Args, ValueEnum};
use imds_ebpf_common::Event;
use nix::{
    errno::Errno,
    net::if_::if_indextoname,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

use super::{Failure, PinDirArg};
use crate::{
    datapath::{home, object, pins::PinDir, pods},
    events::{self, Record, boot_time},
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
    let _claim = pins.claim_events()?;
    let mut ring = object::open_events(&pins)?;
    let names = pods::Names::open(&pins)?;
    loop {
        match print_all(&mut ring, &names, args.output) {
            Ok(()) => {}
            // Whoever read them has had enough, as `head` does.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(ExitCode::SUCCESS),
            Err(error) => return Err(anyhow::Error::from(error).context("can't print events").into()),
        }
        let mut readable = [PollFd::new(ring.as_fd(), PollFlags::POLLIN)];
        match poll(&mut readable, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(anyhow::Error::from(errno).context("can't wait for events").into()),
        }
    }
}

fn print_all(ring: &mut RingBuf<MapData>, names: &pods::Names, output: Output) -> io::Result<()> {
    let mut out = io::stdout().lock();
    let booted = boot_time();
    while let Some(bytes) = ring.next() {
        let Some(event) = decode(&bytes) else { continue };
        let pod = events::senders(&event).find_map(|sender| names.get(sender));
        let record = Record::new(&event, booted, interface_name, pod);
        match output {
            Output::Text => writeln!(out, "{record}")?,
            Output::Json => writeln!(out, "{}", serde_json::to_string(&record)?)?,
        }
    }
    out.flush()
}

/// The event in these bytes, or `None` where they are too few: another version's.
fn decode(bytes: &[u8]) -> Option<Event> {
    let bytes = bytes.first_chunk::<{ size_of::<Event>() }>()?;
    // SAFETY: an event is integers without padding, so that any bytes are one; the read needs no alignment.
    Some(unsafe { bytes.as_ptr().cast::<Event>().read_unaligned() })
}

fn interface_name(index: u32) -> Option<String> {
    if_indextoname(index).ok().and_then(|name| name.into_string().ok())
}
