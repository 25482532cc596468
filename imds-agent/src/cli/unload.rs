//! `imds-agent unload`.

use std::process::ExitCode;

use clap::Args;

use super::{Failure, PinDirArg};
use crate::{
    datapath::{self, Removed, pins::PinDir},
    node::netlink::Netlink,
    preflight,
};

#[derive(Args, Debug)]
pub(super) struct UnloadArgs {
    #[command(flatten)]
    pins: PinDirArg,
}

pub(super) async fn unload(args: UnloadArgs) -> Result<ExitCode, Failure> {
    preflight::check_capabilities()?;
    let pins = PinDir::new(&args.pins.pin_dir)?;
    let netlink = Netlink::connect()?;
    let links = netlink.links().await?;
    match datapath::unload(&pins, &netlink, &links).await? {
        Removed { pin_dir: Some(pin_dir), interfaces, sockets } => {
            let sockets = if sockets { ", and sockets" } else { "" };
            println!("removed {} (guarded until now: {interfaces} interfaces{sockets})", pin_dir.display());
        }
        Removed { pin_dir: None, .. } => println!("nothing is loaded at {}", pins.root().display()),
    }
    Ok(ExitCode::SUCCESS)
}
