//! `imds-agent run`.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context as _, anyhow};
use clap::{Args, ValueEnum};
use futures_util::StreamExt as _;
use imds_ebpf_common::{Backend, IMDS_IPV4};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::{Instant, MissedTickBehavior, interval_at},
};

use super::{Failure, PinDirArg};
use crate::{
    config::Config,
    datapath::{Datapath, bpf, pins::PinDir},
    guard::Guard,
    node::netlink::{Event, Netlink},
    preflight,
};

#[derive(Args, Debug)]
pub(super) struct RunArgs {
    /// Configuration file (TOML); without one, all defaults
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Attach to the pods that are there, then exit; what is attached stays in force
    #[arg(long)]
    once: bool,
    /// How programs are attached to interfaces
    #[arg(long, value_enum, default_value_t = TcBackend::Auto)]
    tc_backend: TcBackend,
    /// Seconds between two looks at everything, for what the kernel sends no event of
    #[arg(long, value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=3600))]
    resync: u64,
    #[command(flatten)]
    pins: PinDirArg,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum TcBackend {
    /// TCX where the kernel has it, clsact otherwise
    Auto,
    /// TCX links (Linux 6.6 and newer)
    Tcx,
    /// Filters on the clsact qdisc
    Clsact,
}

impl TcBackend {
    fn choose(self) -> anyhow::Result<Backend> {
        match (self, bpf::has_tcx()) {
            (Self::Auto | Self::Tcx, true) => Ok(Backend::Tcx),
            (Self::Auto, false) | (Self::Clsact, _) => Ok(Backend::Clsact),
            (Self::Tcx, false) => {
                Err(anyhow!("this kernel has no TCX (Linux 6.6); use --tc-backend clsact or auto"))
            }
        }
    }
}

pub(super) async fn run(args: RunArgs) -> Result<ExitCode, Failure> {
    let config = match &args.config {
        Some(path) => Config::load(path).map_err(|error| Failure::Usage(error.into()))?,
        None => Config::default(),
    };
    preflight::check_capabilities()?;
    preflight::lift_limits()?;
    preflight::check_kernel()?;
    let backend = args.tc_backend.choose()?;
    let claim = PinDir::new(&args.pins.pin_dir)?.claim()?;

    // Listening comes before the first look, so that nothing falls between the two.
    let mut events = Netlink::events(backend == Backend::Clsact)?;
    let netlink = Netlink::connect()?;
    let mode = config.mode;
    let datapath = Datapath::open(claim, mode, backend, netlink.clone())?;
    let mut guard = Guard::new(datapath, netlink, config.interfaces);
    guard.resync().await?;
    log::info!(
        "mode {}: {} pod interface{} guarded by {} against {}, pins in {}",
        mode.name(),
        guard.wanted().count() - guard.failures().count(),
        if guard.wanted().count() == 1 { "" } else { "s" },
        backend.name(),
        std::net::Ipv4Addr::from(IMDS_IPV4),
        args.pins.pin_dir.display(),
    );
    if args.once {
        let failures: Vec<_> = guard.failures().map(|(name, failure)| format!("{name}: {failure}")).collect();
        return if failures.is_empty() {
            Ok(ExitCode::SUCCESS)
        } else {
            Err(Failure::Failed(anyhow!("not everything is guarded: {}", failures.join("; "))))
        };
    }

    let mut terminate = signal(SignalKind::terminate()).context("can't listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("can't listen for SIGINT")?;
    let period = Duration::from_secs(args.resync);
    let mut timer = interval_at(Instant::now() + period, period);
    timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            event = events.next() => {
                let event = event.context("lost the connection to rtnetlink: pods can't be followed")?;
                attempt(&mut guard, Some(event)).await;
            }
            _ = timer.tick() => attempt(&mut guard, None).await,
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        }
    }
    log::info!("stopping; what is attached stays in force until `imds-agent unload`");
    Ok(ExitCode::SUCCESS)
}

/// Takes in one event, or looks at everything. What fails is tried again with the next look at the latest.
async fn attempt(guard: &mut Guard, event: Option<Event>) {
    let result = match event {
        Some(event) => guard.handle(event).await,
        None => guard.resync().await,
    };
    if let Err(error) = result {
        log::error!("{:#}", anyhow::Error::from(error));
    }
}
