//! `imds-agent unload`.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use super::{Failure, PinDirArg, StateDirArg};
use crate::{
    datapath::{self, Removed, pins::PinDir},
    node::netlink::Netlink,
    preflight,
};

/// How often it is said how far it is.
const PROGRESS: Duration = Duration::from_secs(1);

#[derive(Args, Debug)]
pub(super) struct UnloadArgs {
    /// Wait for SIGTERM once it is done: for a service manager, or a cluster, that would start it again
    #[arg(long)]
    hold: bool,
    #[command(flatten)]
    state: StateDirArg,
    #[command(flatten)]
    pins: PinDirArg,
}

pub(super) async fn unload(args: UnloadArgs) -> Result<ExitCode, Failure> {
    preflight::check_capabilities()?;
    let terminate = args.hold.then(|| signal(SignalKind::terminate()));
    let mut terminate = terminate.transpose().context("can't listen for SIGTERM")?;
    let pins = PinDir::new(&args.pins.pin_dir)?;
    let netlink = Netlink::connect()?;
    let links = netlink.links().await?;
    let mut told = Instant::now();
    let progress = |done, all| {
        if told.elapsed() >= PROGRESS {
            eprintln!("detached {done} of {all} links");
            told = Instant::now();
        }
    };
    match datapath::unload(&pins, &netlink, &links, progress).await? {
        Removed { pin_dir: Some(pin_dir), interfaces, sockets } => {
            let sockets = if sockets { ", and sockets" } else { "" };
            println!("removed {} (guarded until now: {interfaces} interfaces{sockets})", pin_dir.display());
        }
        Removed { pin_dir: None, .. } => println!("nothing is loaded at {}", pins.root().display()),
    }
    // A later start must not bring back exemptions of this installation.
    args.state.store().remove()?;
    if let Some(terminate) = &mut terminate {
        terminate.recv().await;
    }
    Ok(ExitCode::SUCCESS)
}
