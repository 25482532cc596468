//! `imds-agent run`.

use std::{convert::Infallible, future, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context as _, anyhow};
use clap::{Args, ValueEnum};
use imds_ebpf_common::AttachMode;
use tokio::task::JoinSet;

use super::{Failure, PinDirArg, StateDirArg};
use crate::{
    agent::Agent,
    config::Listen,
    config_loader::ConfigLoader,
    datapath::{Datapath, bpf, pins::PinDir},
    guard::Guard,
    node::{cgroup, netlink::Netlink, senders::Finder},
    preflight,
    provider::DMI_DIR,
    settings::Node,
    start_config::StartConfig,
    startup_taint,
    telemetry::Telemetry,
};

#[derive(Args, Debug)]
pub(super) struct RunArgs {
    /// Configuration file (TOML); without one, all defaults. It is loaded again when it changes, and on SIGHUP. If it can't be
    /// used at the start, the agent enforces the last good configuration, or the built-in defaults without exemptions
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Attach to the pods that are there, then exit; what is attached stays in force
    #[arg(long)]
    once: bool,
    /// How programs are attached to interfaces
    #[arg(long, value_enum, default_value_t = TcBackend::Auto)]
    tc_backend: TcBackend,
    /// Seconds that a new pod waits for its CNI plugins before it gets a clsact qdisc, unless a process of the pod runs before
    #[arg(long, value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(0..=600))]
    clsact_delay: u64,
    /// Seconds between two looks at everything, for what the kernel sends no event of
    #[arg(long, value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=3600))]
    resync: u64,
    /// cgroup v2 below which sockets are guarded; without it, the root of the hierarchy
    #[arg(long, value_name = "DIR")]
    cgroup: Option<PathBuf>,
    /// Where metrics and health are served, instead of where `metrics.listen` says: an address with a port, or an absolute
    /// path of a Unix socket
    #[arg(long, value_name = "ADDRESS")]
    listen: Vec<Listen>,
    /// Key of a taint that is taken off the node once all is guarded. It takes a role that may get and patch nodes
    #[arg(long, value_name = "KEY", conflicts_with = "once")]
    startup_taint: Option<String>,
    /// Directory of the files by which `provider = "auto"` tells the provider
    #[arg(long, value_name = "DIR", default_value = DMI_DIR, hide = true)]
    dmi_dir: PathBuf,
    #[command(flatten)]
    state: StateDirArg,
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
    fn choose(self) -> anyhow::Result<AttachMode> {
        match (self, bpf::has_tcx()) {
            (Self::Auto | Self::Tcx, true) => Ok(AttachMode::Tcx),
            (Self::Auto, false) | (Self::Clsact, _) => Ok(AttachMode::Clsact),
            (Self::Tcx, false) => {
                Err(anyhow!("this kernel has no TCX (Linux 6.6); use --tc-backend clsact or auto"))
            }
        }
    }
}

pub(super) async fn run(args: RunArgs) -> Result<ExitCode, Failure> {
    if let Some(path) = &args.cgroup {
        cgroup::ensure_v2(path)
            .map_err(|error| Failure::Usage(anyhow!("failed to use --cgroup {}: {error}", path.display())))?;
    }
    preflight::check_capabilities()?;
    preflight::lift_limits()?;
    preflight::check_kernel()?;
    let node = Node { backend: args.tc_backend.choose()?, cgroup: args.cgroup, dmi_dir: args.dmi_dir };
    let mut loader = ConfigLoader::new(args.config, args.listen, args.state.store());
    let mut start = StartConfig::choose(&mut loader, &node)?;
    if let Some(error) = &start.rejected {
        log::error!("failed to load the configuration: {error}");
    }
    if args.once {
        // It ends before the API server could tell of anybody.
        start.settings.cluster = None;
    }
    let settings = &start.settings;
    let claim = PinDir::new(&args.pins.pin_dir)?.claim()?;

    // Listening comes before the first look, so that nothing falls between the two.
    let events = Netlink::events(node.backend == AttachMode::Clsact)?;
    let netlink = Netlink::connect()?.with_endpoints(settings.guarded.addresses());
    let datapath = Datapath::open(claim, &settings.plan, &settings.guarded, netlink.clone())?;
    let mut background = JoinSet::new();
    match datapath.diagnostics() {
        Ok(diagnostics) => drop(background.spawn(async {
            log::warn!("the BPF programs' own log is no longer followed: {}", diagnostics.follow().await);
        })),
        Err(error) => log::warn!("{:#}", anyhow::Error::from(error)),
    }
    let finder = Finder::new().context("can't tell this network namespace")?;
    let clsact_delay = Duration::from_secs(if args.once { 0 } else { args.clsact_delay });
    let mut guard = Guard::new(datapath, netlink, settings, finder).with_clsact_delay(clsact_delay);
    if !args.once {
        let period = Duration::from_secs(args.resync);
        let telemetry = Telemetry::start(PinDir::new(&args.pins.pin_dir)?, period)?;
        let untaint = match args.startup_taint {
            Some(key) if settings.cluster.is_none() && start.rejected.is_some() => {
                log::warn!(
                    "taint {key} stays on the node: restart the agent once its configuration is valid"
                );
                None
            }
            Some(key) => {
                let wanted = settings.cluster.clone().ok_or_else(|| {
                    let message =
                        "--startup-taint takes an API server: see [kubernetes] of the configuration";
                    Failure::Usage(anyhow!(message))
                })?;
                let (pins, netlink) = (PinDir::new(&args.pins.pin_dir)?, Netlink::connect()?);
                Some(startup_taint::take_off(wanted, key, pins, netlink))
            }
            None => None,
        };
        let agent =
            Agent::new(guard, node, loader, settings.clone(), telemetry, period)?.with_background(background);
        let untaint = async {
            if let Some(untaint) = untaint {
                untaint.await;
            }
            future::pending::<Infallible>().await
        };
        tokio::select! {
            ended = agent.run(&start, events) => ended?,
            never = untaint => match never {},
        }
        return Ok(ExitCode::SUCCESS);
    }
    guard.start(&start).await?;
    guard.attach_all().await;
    let failures: Vec<_> = guard.failures().map(|(name, failure)| format!("{name}: {failure}")).collect();
    if !failures.is_empty() {
        return Err(Failure::Failed(anyhow!("not everything is guarded: {}", failures.join("; "))));
    }
    if start.rejected.is_some() {
        // Logged above: the node is protected, but not as the operator configured it.
        return Ok(ExitCode::from(2));
    }
    loader.store_last_good();
    Ok(ExitCode::SUCCESS)
}
