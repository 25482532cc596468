//! `imds-agent run`: sets up the agent and runs it.

use std::{convert::Infallible, future, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context as _, anyhow};
use clap::{Args, ValueEnum};
use imds_ebpf_common::AttachMode;
use tokio::task::JoinSet;

use super::{Failure, PinDirArg, StateDirArg};
use crate::{
    config::{
        Listen,
        loader::ConfigLoader,
        node_pool::{Labels, parse_labels},
        provider::DMI_DIR,
    },
    controller::{
        Reconciler, event_loop::Agent, resolved_config::RunOptions, start_config::StartConfig, startup_taint,
    },
    datapath::{Datapath, maps::config_record, pin::dir::PinDir, sys::bpf},
    diagnose::preflight,
    kube::NodeLabels,
    node::{cgroup, netlink::Netlink, sender_resolver::SenderResolver},
    telemetry::{Telemetry, sinks::SinkSettings},
};

/// Longest time for which `run --once` waits for the labels of the node.
const LABEL_TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Args, Debug)]
pub(super) struct RunArgs {
    /// Configuration file (TOML). Without it, all keys have their defaults. The agent reloads the file when it changes and on
    /// SIGHUP. If the file is invalid at the start, the agent enforces the last good configuration, or the built-in defaults
    /// without exemptions
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Attach to the interfaces that exist and exit. The programs stay attached
    #[arg(long)]
    once: bool,
    /// Attach mode of the programs on interfaces
    #[arg(long, value_enum, default_value_t = TcBackend::Auto)]
    tc_backend: TcBackend,
    /// clsact mode: maximum delay in seconds before the agent creates the qdisc of a new pod's interface. The delay leaves
    /// the qdisc to the CNI plugins, and ends early once the first process starts in the pod
    #[arg(long, value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(0..=600))]
    clsact_delay: u64,
    /// Interval in seconds of the full resync, which repairs changes that the kernel does not report
    #[arg(long, value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=3600))]
    resync: u64,
    /// Directory of the cgroup v2 to which the socket programs are attached. Default: the root of the hierarchy
    #[arg(long, value_name = "DIR")]
    cgroup: Option<PathBuf>,
    /// Address for metrics and health: ADDRESS:PORT, or the absolute path of a Unix socket. Can be repeated. Overrides
    /// `metrics.listen`
    #[arg(long, value_name = "ADDRESS")]
    listen: Vec<Listen>,
    /// Key of a taint that the agent removes from the node once all hooks are enforced. Needs a role that may get and patch
    /// nodes
    #[arg(long, value_name = "KEY", conflicts_with = "once")]
    startup_taint: Option<String>,
    /// Directory of the firmware files (DMI) from which `provider = "auto"` detects the provider
    #[arg(long, value_name = "DIR", default_value = DMI_DIR, hide = true)]
    dmi_dir: PathBuf,
    /// Labels of the node for `[[node_pool]]`, such as `pool=gpu,zone=1`, instead of those that the API server has
    #[arg(long, value_name = "LABELS", value_parser = parse_labels)]
    node_labels: Option<Labels>,
    /// Program that answers the requests of pods with a scoped exemption (`allow`) or an explained denial. Default: `imds-broker` in the directory of the agent
    #[arg(long, value_name = "FILE", conflicts_with = "once")]
    broker: Option<PathBuf>,
    #[command(flatten)]
    state: StateDirArg,
    #[command(flatten)]
    pins: PinDirArg,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum TcBackend {
    /// TCX if the kernel supports it, otherwise clsact
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

/// Chooses the configuration again with the labels of the node, if they decide between pools. A running agent does that once the API
/// server has sent them.
async fn with_node_labels(
    start: StartConfig,
    loader: &mut ConfigLoader,
    options: &RunOptions,
    pins: &PinDir,
) -> anyhow::Result<StartConfig> {
    let Some(api) = start.resolved.cluster.clone().filter(|_| loader.needs_node_labels()) else {
        return Ok(start);
    };
    let Some(labels) = NodeLabels::start(api).first(LABEL_TIMEOUT).await else {
        log::warn!(
            "attaching without the labels of the node, with the strictest mode of all pools that may match"
        );
        return Ok(start);
    };
    loader.set_node_labels(labels);
    StartConfig::choose(loader, options, pins)
}

pub(super) async fn run(args: RunArgs) -> Result<ExitCode, Failure> {
    if let Some(path) = &args.cgroup {
        cgroup::ensure_v2(path)
            .map_err(|error| Failure::Usage(anyhow!("failed to use --cgroup {}: {error}", path.display())))?;
    }
    preflight::check_capabilities()?;
    preflight::lift_limits()?;
    preflight::check_kernel()?;
    let node = RunOptions { backend: args.tc_backend.choose()?, cgroup: args.cgroup, dmi_dir: args.dmi_dir };
    let pins = PinDir::new(&args.pins.pin_dir)?;
    let effective = config_record::pinned(&pins).map(|record| record.text);
    let mut loader = ConfigLoader::new(args.config, args.listen, args.state.store())
        .with_node(args.node_labels, effective);
    let mut start = StartConfig::choose(&mut loader, &node, &pins)?;
    if let Some(error) = &start.rejected {
        log::error!("failed to load the configuration: {error}");
    }
    if args.once {
        start = with_node_labels(start, &mut loader, &node, &pins).await?;
        // The process ends before the pod watch could deliver a pod.
        start.resolved.cluster = None;
    }
    let resolved = &start.resolved;
    let senders = SenderResolver::new().context("failed to identify this network namespace")?;
    // Without pins, links would end with a process that only attaches.
    let pin_lock = if args.once { pins.lock()? } else { pins.lock_or_run_unpinned()? };

    // Subscribe before the first listing, so that no change between the two is missed.
    let events = Netlink::events(node.backend == AttachMode::Clsact)?;
    let netlink = Netlink::connect()?.with_endpoints(resolved.endpoint_set.addresses());
    let datapath =
        Datapath::open(pin_lock, &resolved.datapath_config, &resolved.endpoint_set, netlink.clone())?;
    let mut background = JoinSet::new();
    match datapath.diagnostics() {
        Ok(diagnostics) => drop(background.spawn(async {
            log::warn!("failed to read the log of the BPF programs: {}", diagnostics.follow().await);
        })),
        Err(error) => log::warn!("{:#}", anyhow::Error::from(error)),
    }
    let clsact_delay = Duration::from_secs(if args.once { 0 } else { args.clsact_delay });
    let mut reconciler =
        Reconciler::new(datapath, netlink, resolved, senders).with_clsact_delay(clsact_delay);
    if !args.once {
        reconciler = reconciler.with_broker(args.broker);
        let period = Duration::from_secs(args.resync);
        let sinks = SinkSettings::new(&start.config, &resolved.endpoint_set, &resolved.exempt);
        let telemetry = Telemetry::start(pins.clone(), period, sinks)?;
        let taint_removal = match args.startup_taint {
            Some(key) if resolved.cluster.is_none() && start.rejected.is_some() => {
                log::warn!(
                    "taint {key} stays on the node: restart the agent once its configuration is valid"
                );
                None
            }
            Some(key) => {
                let api = resolved.cluster.clone().ok_or_else(|| {
                    let message =
                        "--startup-taint needs access to an API server: see [kubernetes] in the configuration";
                    Failure::Usage(anyhow!(message))
                })?;
                Some(startup_taint::remove_startup_taint(api, key, pins.clone(), Netlink::connect()?))
            }
            None => None,
        };
        let agent = Agent::new(reconciler, node, loader, resolved.clone(), telemetry, period, background)?;
        let taint_removal = async {
            if let Some(taint_removal) = taint_removal {
                taint_removal.await;
            }
            future::pending::<Infallible>().await
        };
        tokio::select! {
            ended = agent.run(&start, events) => ended?,
            never = taint_removal => match never {},
        }
        return Ok(ExitCode::SUCCESS);
    }
    reconciler.start(&start).await?;
    reconciler.attach_all().await;
    let errors: Vec<_> = reconciler.errors().map(|(name, error)| format!("{name}: {error}")).collect();
    if !errors.is_empty() {
        return Err(Failure::Failed(anyhow!("failed to attach to all interfaces: {}", errors.join("; "))));
    }
    if start.rejected.is_some() {
        // Logged above: the node is protected, but not as the operator configured it.
        return Ok(ExitCode::from(2));
    }
    loader.store_last_good();
    Ok(ExitCode::SUCCESS)
}
